#include "storage/transfer.h"

#include <unistd.h>

#include <algorithm>

namespace dataeff {
namespace {

// The clock of Python's time.perf_counter_ns on Linux.
int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string path_of(int fd) {
  char path[4096];
  const ssize_t length =
      readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path));
  return length > 0 ? std::string(path, length) : "fd " + std::to_string(fd);
}

}  // namespace

const char* op_name(Op op) {
  return op == Op::kRead ? "read" : op == Op::kWrite ? "write" : "reservation";
}

Transfer::Transfer(Op op, int fd, char* data, int64_t nbytes, int64_t offset,
                   const Alignment& alignment, int64_t room)
    : op(op),
      fd(fd),
      data(data),
      nbytes(nbytes),
      offset(offset),
      room(std::max(room, nbytes)),
      alignment(alignment),
      pid_(getpid()),
      num_left_(nbytes) {
  if (nbytes == 0) {
    start_ns_ = now_ns();
    finish(State::kDone);
  }
}

bool Transfer::wait_for(std::chrono::nanoseconds timeout) {
  if (done()) return true;
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, timeout, [this] { return done(); });
}

bool Transfer::cancel() {
  State expected = State::kQueued;
  if (!state_.compare_exchange_strong(expected, State::kCancelled)) {
    return expected == State::kCancelled;
  }
  finish(State::kCancelled);
  return true;
}

const Transfer::Failure* Transfer::failure() const {
  return done() && failed() ? &failure_ : nullptr;
}

bool Transfer::of_this_process() const { return pid_ == getpid(); }

std::string Transfer::describe() const {
  return std::string(op_name(op)) + " of " + std::to_string(nbytes) + " bytes at offset " +
         std::to_string(offset) + " of " + path_of(fd);
}

bool Transfer::begin() {
  State expected = State::kQueued;
  if (!state_.compare_exchange_strong(expected, State::kBegun)) return false;
  start_ns_.store(now_ns(), std::memory_order_relaxed);
  return true;
}

void Transfer::fail(Failure failure) {
  std::lock_guard lock(mutex_);
  if (failed()) return;  // the first failure is the cause
  failure_ = std::move(failure);
  failed_.store(true, std::memory_order_release);
}

void Transfer::account(int64_t nbytes) {
  if (num_left_.fetch_sub(nbytes, std::memory_order_acq_rel) == nbytes) finish(State::kDone);
}

void Transfer::finish(State state) {
  end_ns_.store(now_ns(), std::memory_order_relaxed);
  // Under the lock, so that a waiter cannot look, miss it and sleep through the notification.
  std::lock_guard lock(mutex_);
  state_.store(state, std::memory_order_release);
  finished_.notify_all();
}

}  // namespace dataeff
