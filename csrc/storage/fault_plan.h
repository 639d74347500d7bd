// Faults to inject into an engine: what a failing, slow or crowded disk would answer.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "storage/transfer.h"

namespace dataeff {

// What one attempt (one system call, or one io_uring request) is to suffer.
struct Fault {
  int error = 0;                           // errno to answer with, the kernel not asked; 0: none
  std::optional<int64_t> max_nbytes = {};  // the most that the attempt may move (or reserve)
  std::chrono::nanoseconds delay{0};       // waited before the attempt
  bool corrupt = false;                    // flips one bit of what was read
};

// Rules over the sequence of attempts. Every engine asks `next` before each attempt, so that the
// code that retries, continues and reports is the code that runs in production. Thread-safe.
class FaultPlan {
 public:
  // Applies `fault` to the `nth` attempt of its kind (from 1), then to every `every`-th after it,
  // `times` times in all (without end when it has no value). No `op` means reads and writes, not
  // reservations.
  void add(std::optional<Op> op, const Fault& fault, int64_t nth, int64_t every,
           std::optional<int64_t> times);

  // The faults of the next attempt, merged when several rules meet: delays add up.
  Fault next(Op op);

  int64_t num_attempts(Op op) const;
  int64_t num_injected() const;

 private:
  struct Rule {
    std::optional<Op> op;
    Fault fault;
    int64_t nth;
    int64_t every;
    std::optional<int64_t> times;
    int64_t num_seen = 0;
  };

  mutable std::mutex mutex_;
  std::vector<Rule> rules_;
  int64_t num_attempts_[3] = {0, 0, 0};
  int64_t num_injected_ = 0;
};

}  // namespace dataeff
