// The life of one piece: attempts, short transfers, retries, alignment, failure. Every engine
// drives this one state machine; they differ only in how an attempt reaches the kernel.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "memory/host_mapping.h"
#include "storage/fault_plan.h"
#include "storage/transfer_queue.h"

namespace dataeff {

// Page-aligned memory for what direct I/O cannot reach in place; mapped when first needed and kept
// by its thread or slot.
class BounceBuffer {
 public:
  char* data();

 private:
  std::shared_ptr<HostMapping> mapping_;
};

class PieceIo {
 public:
  // One system call to make, after `fault.delay`.
  struct Attempt {
    char* data = nullptr;
    int64_t nbytes = 0;
    int64_t offset = 0;
    Fault fault{};
    std::chrono::nanoseconds pause{0};  // before the attempt: injected delay and back-off
  };

  // `faults` may be null.
  PieceIo(Piece piece, BounceBuffer& bounce, FaultPlan* faults);

  // What to try next. When `fault.error` is set the kernel is not asked: the result is its
  // negative.
  Attempt next();

  // Takes the attempt's result, a byte count or a negative errno. True when the piece is finished
  // and its transfer told, successfully or not.
  bool advance(const Attempt& attempt, int64_t result);

  // Makes the attempt here and now, with pread or pwrite; returns what `advance` takes.
  int64_t call(const Attempt& attempt) const;

  const Transfer& transfer() const { return *piece_.transfer; }

 private:
  bool fail(int code, bool end_of_file = false);
  bool succeed();

  Piece piece_;
  FaultPlan* const faults_;
  char* const target_;  // the caller's memory for this piece
  char* base_;          // where attempts read and write: `target_` or the bounce buffer
  int64_t length_;      // bytes that attempts move in all: padded to whole blocks when bounced
  int64_t moved_ = 0;
  int refusal_ = 0;      // errno when there was no memory to bounce through
  int num_retries_ = 0;  // in a row, without progress
};

}  // namespace dataeff
