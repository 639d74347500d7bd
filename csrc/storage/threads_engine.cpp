#include "storage/threads_engine.h"

#include <stdexcept>
#include <utility>

namespace dataeff {
namespace {

void run_blocking(PieceIo& io, const Mover& mover) {
  for (;;) {
    const PieceIo::Attempt attempt = io.next();
    if (attempt.pause.count() > 0) std::this_thread::sleep_for(attempt.pause);
    const int64_t result = attempt.fault.error ? -attempt.fault.error : mover(io, attempt);
    if (io.advance(attempt, result)) return;
  }
}

}  // namespace

ThreadsEngine::ThreadsEngine(std::string name, int num_threads, std::shared_ptr<FaultPlan> faults,
                             Mover mover, bool any_memory)
    : Engine(std::move(name), std::move(faults)),
      any_memory_(any_memory),
      state_(std::make_unique<State>()) {
  if (num_threads < 1 || num_threads > 256) {
    throw std::invalid_argument("num_threads=" + std::to_string(num_threads) +
                                " is not between 1 and 256");
  }
  state_->mover = std::move(mover);
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

ThreadsEngine::~ThreadsEngine() {
  close(/*cancel=*/true);
  // A forked child has the memory of the threads but not the threads: nothing to join, and
  // destroying what they wait on would hang.
  if (!of_this_process()) (void)state_.release();
}

void ThreadsEngine::close(bool cancel) {
  if (!of_this_process()) return;
  state_->queue.close(cancel);
  std::lock_guard lock(state_->joining);
  for (std::thread& worker : state_->workers) worker.join();
  state_->workers.clear();
  state_->mover = nullptr;  // what it knows of the files goes before they are closed
}

bool ThreadsEngine::enqueue(std::shared_ptr<Transfer> transfer) {
  return state_->queue.push(std::move(transfer));
}

Alignment ThreadsEngine::alignment_for(int fd) const {
  const Alignment alignment = Engine::alignment_for(fd);
  return any_memory_ ? Alignment{} : alignment;
}

// Somebody waits for a read now, for a write only later, so reads go first; the first worker looks
// for writes first, so that neither kind starves. A lone worker alternates.
void ThreadsEngine::serve(int index, int num_threads) {
  BounceBuffer bounce;
  Op preferred = index == 0 && num_threads > 1 ? Op::kWrite : Op::kRead;
  for (Piece piece; state_->queue.take(preferred, piece);) {
    PieceIo io(std::move(piece), bounce, faults_.get());
    run_blocking(io, state_->mover);
    if (num_threads == 1) preferred = preferred == Op::kRead ? Op::kWrite : Op::kRead;
  }
}

std::shared_ptr<Engine> make_threads_engine(int num_threads, std::shared_ptr<FaultPlan> faults) {
  return std::make_shared<ThreadsEngine>("threads", num_threads, std::move(faults), &PieceIo::call,
                                         /*any_memory=*/false);
}

}  // namespace dataeff
