#include "parallel/parallel_for.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

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
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // written by the thread that sets `failed`
  int num_active = 0;          // guarded by the pool's mutex
  std::condition_variable idle{};

  // Takes pieces until there are none, on as many threads at once as call it.
  void work() {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= size) return;
        body(begin, std::min(begin + grain, size));
      }
    } catch (...) {
      next.store(size, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
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
    job.work();
    std::unique_lock lock(mutex_);
    std::erase(queue_, &job);  // nobody came for these: the work is done already
    job.idle.wait(lock, [&] { return job.num_active == 0; });
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
      job->work();
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

std::atomic<OpenMpParallel> openmp_parallel{nullptr};

thread_local int loop_threads = 0;

// A forked child has the memory of the pool and of the team, but none of their threads.
void forget_threads_when_forked() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      pool = new Pool;
      openmp_parallel = nullptr;
    });
  });
}

bool in_main_thread() {
  static thread_local const bool is_main = syscall(SYS_gettid) == getpid();
  return is_main;
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
  const OpenMpParallel parallel = in_main_thread() ? openmp_parallel.load() : nullptr;
  if (parallel) {
    parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, num_helpers + 1, 0);
  } else {
    forget_threads_when_forked();
    pool->run(job, num_helpers);
  }
  if (job.error) std::rethrow_exception(job.error);
}

int loop_threads_here() { return loop_threads; }

void set_loop_threads_here(int num_threads) { loop_threads = num_threads; }

void use_openmp_team(OpenMpParallel parallel) {
  forget_threads_when_forked();
  openmp_parallel = parallel;
}

}  // namespace dataeff
