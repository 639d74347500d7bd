#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "storage/engine.h"
#include "storage/piece_io.h"
#include "storage/transfer_queue.h"

namespace dataeff {
namespace {

class ThreadsEngine final : public Engine {
 public:
  ThreadsEngine(int num_threads, std::shared_ptr<FaultPlan> faults)
      : Engine("threads", std::move(faults)), state_(std::make_unique<State>()) {
    state_->workers.reserve(num_threads);
    try {
      for (int i = 0; i < num_threads; ++i) {
        state_->workers.emplace_back([this, i, num_threads] { serve(i, num_threads); });
      }
    } catch (...) {  // the system gives no more threads
      close(/*cancel=*/true);
      throw;
    }
  }

  ~ThreadsEngine() override {
    close(/*cancel=*/true);
    // A forked child has the memory of the threads but not the threads: nothing to join, and
    // destroying what they wait on would hang.
    if (!of_this_process()) (void)state_.release();
  }

  void close(bool cancel) override {
    if (!of_this_process()) return;
    state_->queue.close(cancel);
    std::lock_guard lock(state_->joining);
    for (std::thread& worker : state_->workers) worker.join();
    state_->workers.clear();
  }

  bool closed() const override { return state_->queue.closed(); }

 protected:
  bool enqueue(std::shared_ptr<Transfer> transfer) override {
    return state_->queue.push(std::move(transfer));
  }

 private:
  struct State {
    TransferQueue queue;
    std::mutex joining;
    std::vector<std::thread> workers;
  };

  // Somebody waits for a read now, for a write only later, so reads go first; the first worker
  // looks for writes first, so that neither kind starves. A lone worker alternates.
  void serve(int index, int num_threads) {
    BounceBuffer bounce;
    Op preferred = index == 0 && num_threads > 1 ? Op::kWrite : Op::kRead;
    for (Piece piece; state_->queue.take(preferred, piece);) {
      PieceIo io(std::move(piece), bounce, faults_.get());
      run_blocking(io);
      if (num_threads == 1) preferred = preferred == Op::kRead ? Op::kWrite : Op::kRead;
    }
  }

  std::unique_ptr<State> state_;
};

}  // namespace

std::shared_ptr<Engine> make_threads_engine(int num_threads, std::shared_ptr<FaultPlan> faults) {
  if (num_threads < 1 || num_threads > 256) {
    throw std::invalid_argument("num_threads=" + std::to_string(num_threads) +
                                " is not between 1 and 256");
  }
  return std::make_shared<ThreadsEngine>(num_threads, std::move(faults));
}

}  // namespace dataeff
