// One read or write of one stretch of a file: a future that is waited for, cancelled, checked.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>

#include "storage/alignment.h"

namespace dataeff {

enum class Op : uint8_t {
  kRead = 0,
  kWrite = 1,
  kReserve = 2,  // of space on the disk: no engine moves it, but faults can be injected into it
};

const char* op_name(Op op);

// Shared by the caller and the engine. The memory behind `data` is the caller's and must live until
// the transfer is done or cancelled.
class Transfer {
 public:
  // How it failed. `end_of_file` is a read beyond the last byte, which has no errno.
  struct Failure {
    int code = 0;
    bool end_of_file = false;
    std::string text;
  };

  // `room`, when larger than `nbytes`, is how much of the memory a read may overwrite: direct I/O
  // reads whole blocks, and with room for the last one it needs no bounce.
  Transfer(Op op, int fd, char* data, int64_t nbytes, int64_t offset, const Alignment& alignment,
           int64_t room = 0);

  // For the caller.
  bool wait_for(std::chrono::nanoseconds timeout);  // false when the time is over
  bool done() const { return state_.load(std::memory_order_acquire) >= State::kDone; }
  bool cancelled() const { return state_.load(std::memory_order_acquire) == State::kCancelled; }
  bool cancel();  // true when no byte has moved and none will
  // How it failed, or nullptr; only once it is done.
  const Failure* failure() const;
  int64_t start_ns() const { return start_ns_.load(std::memory_order_relaxed); }
  int64_t end_ns() const { return end_ns_.load(std::memory_order_relaxed); }
  // Transfers of the parent's engine never end in a forked child.
  bool of_this_process() const;
  std::string describe() const;  // "write of 4096 bytes at offset 0 of /tmp/x"

  // For engines. `begin` is false when the transfer was cancelled; each piece is accounted for
  // once, whether it moved, failed or was skipped because another piece had failed.
  bool begin();
  void fail(Failure failure);
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  void account(int64_t nbytes);

  const Op op;
  const int fd;
  char* const data;
  const int64_t nbytes;
  const int64_t offset;
  const int64_t room;
  const Alignment alignment;

 private:
  enum class State : uint8_t { kQueued, kBegun, kDone, kCancelled };
  void finish(State state);

  const pid_t pid_;
  std::atomic<State> state_{State::kQueued};
  std::atomic<bool> failed_{false};
  std::atomic<int64_t> num_left_;
  std::atomic<int64_t> start_ns_{0};
  std::atomic<int64_t> end_ns_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  Failure failure_;  // written once, under mutex_, before the state becomes kDone
};

}  // namespace dataeff
