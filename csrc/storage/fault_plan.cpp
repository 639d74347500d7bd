#include "storage/fault_plan.h"

#include <algorithm>
#include <stdexcept>

namespace dataeff {

void FaultPlan::add(std::optional<Op> op, const Fault& fault, int64_t nth, int64_t every,
                    std::optional<int64_t> times) {
  if (nth < 1 || every < 1) throw std::invalid_argument("nth and every count from 1");
  if (fault.max_nbytes && *fault.max_nbytes < 1) {
    throw std::invalid_argument(
        "max_nbytes must be at least 1: an attempt that moves nothing is "
        "the end of the file");
  }
  std::lock_guard lock(mutex_);
  rules_.push_back({op, fault, nth, every, times});
}

Fault FaultPlan::next(Op op) {
  std::lock_guard lock(mutex_);
  ++num_attempts_[static_cast<int>(op)];
  Fault merged;
  bool any = false;
  for (Rule& rule : rules_) {
    if (rule.op ? *rule.op != op : op == Op::kReserve) continue;
    const int64_t since = ++rule.num_seen - rule.nth;
    if (since < 0 || since % rule.every != 0) continue;
    if (rule.times && since / rule.every >= *rule.times) continue;
    any = true;
    if (rule.fault.error) merged.error = rule.fault.error;
    if (rule.fault.max_nbytes) {
      merged.max_nbytes = std::min(merged.max_nbytes.value_or(INT64_MAX), *rule.fault.max_nbytes);
    }
    merged.delay += rule.fault.delay;
    merged.corrupt |= rule.fault.corrupt;
  }
  num_injected_ += any;
  return merged;
}

int64_t FaultPlan::num_attempts(Op op) const {
  std::lock_guard lock(mutex_);
  return num_attempts_[static_cast<int>(op)];
}

int64_t FaultPlan::num_injected() const {
  std::lock_guard lock(mutex_);
  return num_injected_;
}

}  // namespace dataeff
