#include "storage/piece_io.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "errors.h"

namespace dataeff {
namespace {

// A disk that answers EAGAIN, EINTR or "0 bytes written" this often in a row is not coming back.
constexpr int kMaxRetries = 1000;

std::chrono::nanoseconds back_off(int num_retries) {
  if (num_retries == 0) return std::chrono::nanoseconds{0};
  return std::chrono::microseconds{10 << std::min(num_retries - 1, 7)};
}

}  // namespace

char* BounceBuffer::data() {
  if (!mapping_) mapping_ = HostMapping::create(TransferQueue::kPieceBytes, /*shared=*/false);
  return mapping_->data();
}

PieceIo::PieceIo(Piece piece, BounceBuffer& bounce, FaultPlan* faults)
    : piece_(std::move(piece)),
      faults_(faults),
      target_(piece_.transfer->data + piece_.begin),
      base_(target_),
      length_(piece_.nbytes) {
  const Alignment& alignment = transfer().alignment;
  const int64_t padded = round_up(length_, alignment.block);
  const bool room =
      padded == length_ || (transfer().op == Op::kRead && padded <= transfer().room - piece_.begin);
  if (reinterpret_cast<uintptr_t>(target_) % alignment.memory == 0 && room) {
    length_ = padded;
    return;
  }
  try {
    base_ = bounce.data();
  } catch (const OsError& e) {  // no memory: the first attempt reports it
    refusal_ = e.code();
    return;
  }
  length_ = padded;
  if (transfer().op == Op::kWrite) {
    std::memcpy(base_, target_, piece_.nbytes);
    std::memset(base_ + piece_.nbytes, 0, length_ - piece_.nbytes);
  }
}

PieceIo::Attempt PieceIo::next() {
  Attempt attempt{base_ + moved_, length_ - moved_, transfer().offset + piece_.begin + moved_};
  if (faults_) attempt.fault = faults_->next(transfer().op);
  if (refusal_) attempt.fault.error = refusal_;
  attempt.pause = attempt.fault.delay + back_off(num_retries_);
  if (attempt.fault.max_nbytes) {
    // The kernel is asked for whole blocks; `advance` then reports the shorter count.
    const int64_t asked = round_up(*attempt.fault.max_nbytes, transfer().alignment.block);
    attempt.nbytes = std::min(attempt.nbytes, asked);
  }
  return attempt;
}

int64_t PieceIo::call(const Attempt& attempt) const {
  const int fd = transfer().fd;
  const int64_t result = transfer().op == Op::kRead
                             ? pread(fd, attempt.data, attempt.nbytes, attempt.offset)
                             : pwrite(fd, attempt.data, attempt.nbytes, attempt.offset);
  return result < 0 ? -errno : result;
}

bool PieceIo::advance(const Attempt& attempt, int64_t result) {
  if (result < 0) {
    const int code = static_cast<int>(-result);
    const bool transient = code == EINTR || code == EAGAIN;
    if (transient && ++num_retries_ <= kMaxRetries) return false;
    return fail(code);
  }
  if (attempt.fault.max_nbytes) result = std::min(result, *attempt.fault.max_nbytes);
  if (attempt.fault.corrupt && transfer().op == Op::kRead && result > 0) attempt.data[0] ^= 1;
  // Of a padded read only the bytes asked for must be there: a file need not end on a block.
  const int64_t wanted = transfer().op == Op::kRead ? piece_.nbytes : length_;
  if (moved_ + result >= wanted) return succeed();
  // Direct I/O can only go on from a block boundary: a part of a block is moved again.
  const int64_t progress = result / transfer().alignment.block * transfer().alignment.block;
  if (progress > 0) {
    moved_ += progress;
    num_retries_ = 0;
    return false;
  }
  // A block that keeps coming back short is the end of the file, or a disk that takes no more.
  // Only a file's end is short of a block without cause, so a second answer is asked for.
  const bool injected = attempt.fault.max_nbytes.has_value();
  if (transfer().op == Op::kRead && !injected) return fail(0, /*end_of_file=*/true);
  if (++num_retries_ > kMaxRetries) return fail(EIO);
  return false;
}

bool PieceIo::succeed() {
  if (base_ != target_ && transfer().op == Op::kRead) std::memcpy(target_, base_, piece_.nbytes);
  piece_.transfer->account(piece_.nbytes);
  return true;
}

bool PieceIo::fail(int code, bool end_of_file) {
  const int64_t at = transfer().offset + piece_.begin + moved_;
  std::string text = transfer().describe() + " failed at offset " + std::to_string(at) + ": ";
  if (end_of_file) {
    text += "the file ends there";
  } else {
    text += std::strerror(code);
  }
  if (code == EINVAL && transfer().alignment.direct) {
    text += " (the file is open for direct I/O: its offset must be a multiple of " +
            std::to_string(transfer().alignment.block) + ")";
  }
  piece_.transfer->fail({code, end_of_file, std::move(text)});
  piece_.transfer->account(piece_.nbytes);
  return true;
}

}  // namespace dataeff
