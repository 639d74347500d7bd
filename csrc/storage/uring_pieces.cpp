#include "storage/uring_pieces.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "errors.h"

namespace dataeff {

#ifdef DATAEFF_WITH_URING
namespace {

// user_data of a completion: a slot's index; this bit marks the end of its pause.
constexpr uint64_t kPause = uint64_t{1} << 63;
constexpr int64_t kMostBytes = int64_t{1} << 30;  // of one request

}  // namespace

UringPieces::UringPieces(int depth, int num_others, FaultPlan* faults)
    : uring_(std::in_place, depth + num_others), slots_(depth), faults_(faults) {
  for (int i = depth - 1; i >= 0; --i) idle_.push_back(i);
}

void UringPieces::begin(Piece piece) {
  const int index = idle_.back();
  idle_.pop_back();
  Slot& slot = slots_[index];
  slot.io.emplace(std::move(piece), slot.bounce, faults_);
  attempt(index);
}

void UringPieces::wait(std::optional<std::chrono::nanoseconds> limit) {
  try {
    uring_->submit_and_wait(limit);
  } catch (const OsError&) {
    go_on_without_ring();
  }
  reap();
}

void UringPieces::go_on_without_ring() {
  lost_ = true;
  uint64_t user_data;
  while (uring_->take_back(user_data)) {
    if (user_data != kOther) send(static_cast<int>(user_data & ~kPause));
  }
  while (!idle()) {
    // The kernel's completions are handed over whenever this thread returns from a system call.
    std::this_thread::sleep_for(std::chrono::microseconds{100});
    reap();
  }
}

void UringPieces::reap() {
  uint64_t user_data;
  int32_t result;
  while (uring_->reap(user_data, result)) {
    if (user_data == kOther) {
      other();
    } else if (user_data & kPause) {
      send(static_cast<int>(user_data & ~kPause));
    } else {
      advance(static_cast<int>(user_data), result);
    }
  }
}

// Starts the slot's next attempt, after its pause.
void UringPieces::attempt(int index) {
  Slot& slot = slots_[index];
  slot.attempt = slot.io->next();
  const int64_t pause_ns = slot.attempt.pause.count();
  if (pause_ns > 0 && lost_) std::this_thread::sleep_for(slot.attempt.pause);
  if (pause_ns == 0 || lost_) {
    send(index);
    return;
  }
  slot.pause = {pause_ns / 1'000'000'000, pause_ns % 1'000'000'000};
  io_uring_sqe& sqe = uring_->prepare();
  sqe.opcode = IORING_OP_TIMEOUT;
  sqe.addr = reinterpret_cast<uint64_t>(&slot.pause);
  sqe.len = 1;
  sqe.user_data = kPause | index;
}

void UringPieces::send(int index) {
  Slot& slot = slots_[index];
  if (slot.attempt.fault.error) {
    advance(index, -slot.attempt.fault.error);
    return;
  }
  if (lost_) {
    advance(index, slot.io->call(slot.attempt));
    return;
  }
  const Transfer& transfer = slot.io->transfer();
  io_uring_sqe& sqe = uring_->prepare();
  sqe.opcode = transfer.op == Op::kRead ? IORING_OP_READ : IORING_OP_WRITE;
  sqe.fd = transfer.fd;
  sqe.addr = reinterpret_cast<uint64_t>(slot.attempt.data);
  sqe.len = static_cast<uint32_t>(std::min(slot.attempt.nbytes, kMostBytes));
  sqe.off = slot.attempt.offset;
  if (in_parallel()) sqe.flags = IOSQE_ASYNC;
  sqe.user_data = index;
}

void UringPieces::advance(int index, int64_t result) {
  Slot& slot = slots_[index];
  if (!slot.io->advance(slot.attempt, result)) {
    attempt(index);
    return;
  }
  ended(index, slot.io->transfer());
  slot.io.reset();
  idle_.push_back(index);
}

#endif

}  // namespace dataeff
