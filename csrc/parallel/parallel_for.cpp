#include "parallel/parallel_for.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace dataeff {
namespace {

struct Job {
  const std::function<void(int64_t, int64_t)>& body;
  const int64_t size;
  const int64_t grain;
  std::atomic<int64_t> next{0};
  int num_active = 0;          // guarded by the pool's mutex
  std::exception_ptr error{};  // guarded by the pool's mutex
  std::condition_variable idle{};
};

class Pool {
 public:
  void run(Job& job, int num_helpers) {
    {
      std::lock_guard lock(mutex_);
      for (; num_workers_ < num_helpers; ++num_workers_) {
        std::thread([this] { serve(); }).detach();
      }
      queue_.insert(queue_.end(), num_helpers, &job);
    }
    wake_.notify_all();
    work(job);
    std::unique_lock lock(mutex_);
    std::erase(queue_, &job);  // nobody came for these: the work is done already
    job.idle.wait(lock, [&] { return job.num_active == 0; });
  }

  void work(Job& job) {
    try {
      for (;;) {
        const int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
        if (begin >= job.size) return;
        job.body(begin, std::min(begin + job.grain, job.size));
      }
    } catch (...) {
      job.next.store(job.size, std::memory_order_relaxed);
      std::lock_guard lock(mutex_);
      if (!job.error) job.error = std::current_exception();
    }
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !queue_.empty(); });
      Job* job = queue_.front();
      queue_.pop_front();
      ++job->num_active;
      lock.unlock();
      work(*job);
      lock.lock();
      if (--job->num_active == 0) job->idle.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job*> queue_;
  int num_workers_ = 0;
};

// Never destroyed: its detached workers may outlive static destruction.
Pool* pool = nullptr;

Pool& get_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    // A forked child has the pool's memory but none of its threads.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void parallel_for(int64_t size, int64_t grain, int num_threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t num_pieces = (size - 1) / grain + 1;
  const int num_helpers = static_cast<int>(std::min<int64_t>(num_threads, num_pieces)) - 1;
  if (num_helpers <= 0) {
    for (int64_t begin = 0; begin < size; begin += grain)
      body(begin, std::min(begin + grain, size));
    return;
  }
  Job job{body, size, grain};
  get_pool().run(job, num_helpers);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace dataeff
