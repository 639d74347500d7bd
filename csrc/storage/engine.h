// An asynchronous file engine: transfers go in, the caller waits on each.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>

#include "storage/fault_plan.h"
#include "storage/transfer.h"

namespace dataeff {

// Thread-safe. Transfers may end in any order: a read of what a write still carries must wait for
// that write first.
class Engine {
 public:
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Moves `nbytes` between `data` and the file. On a file open for direct I/O `offset` must be a
  // multiple of its block; memory that is not aligned is bounced, and the last part of a write is
  // padded with zeros to a whole block, so whoever writes owns that block to its end. A read may
  // overwrite `room` bytes from `data` on, if that is more than `nbytes`.
  //
  // Throws std::invalid_argument (closed engine, bad arguments), std::runtime_error (forked child)
  // and OsError (bad fd). Failures of the transfer itself are the transfer's.
  std::shared_ptr<Transfer> submit(Op op, int fd, char* data, int64_t nbytes, int64_t offset,
                                   int64_t room = 0);

  // Ends every transfer and stops the threads. With `cancel`, those that have not begun are
  // cancelled. A second call, and any call in a forked child, does nothing.
  virtual void close(bool cancel) = 0;
  virtual bool closed() const = 0;

  const std::string& name() const { return name_; }
  bool of_this_process() const;

 protected:
  Engine(std::string name, std::shared_ptr<FaultPlan> faults);
  // False when the engine is closed.
  virtual bool enqueue(std::shared_ptr<Transfer> transfer) = 0;
  // What a transfer to or from `fd` must be aligned to. Throws OsError (bad fd).
  virtual Alignment alignment_for(int fd) const { return alignment_of(fd); }

  const std::shared_ptr<FaultPlan> faults_;

 private:
  const std::string name_;
  const pid_t pid_;
};

// Blocking pread and pwrite on `num_threads` threads of its own.
std::shared_ptr<Engine> make_threads_engine(int num_threads, std::shared_ptr<FaultPlan> faults);

// One thread that keeps up to `queue_depth` requests of 1 MiB with the kernel. Throws OsError with
// a reason where io_uring is missing or forbidden. Memory that direct I/O cannot reach in place is
// copied by that one thread: with such memory the threads engine is faster.
std::shared_ptr<Engine> make_uring_engine(int queue_depth, std::shared_ptr<FaultPlan> faults);

// Blocking cuFile calls on `num_threads` threads, between files and the memory of a GPU. Throws
// OsError with a reason where `library` does not load or would not reach the GPU directly.
std::shared_ptr<Engine> make_cufile_engine(const std::string& library, int num_threads);

}  // namespace dataeff
