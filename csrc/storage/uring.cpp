#include "storage/uring.h"

#ifdef DATAEFF_WITH_URING

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

#include "errors.h"

// The numbers are the same on every architecture; older C libraries do not name them.
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_enter 426
#endif

namespace dataeff {
namespace {

// Came with Linux 5.11; older headers do not have them.
constexpr unsigned kLimited = 1u << 3;      // IORING_ENTER_EXT_ARG
constexpr unsigned kLimitsWaits = 1u << 8;  // IORING_FEAT_EXT_ARG
struct WaitArguments {                      // io_uring_getevents_arg
  uint64_t signals;
  uint32_t signals_nbytes;
  uint32_t pad;
  uint64_t span;
};

const char* reason(int code) {
  switch (code) {
    case ENOSYS:
      return "this kernel or sandbox has no io_uring (Linux 5.6 or later has)";
    case EPERM:
    case EACCES:
      return "io_uring is forbidden to this process (sysctl kernel.io_uring_disabled, or the "
             "container's seccomp profile)";
    case ENOMEM:
      return "io_uring may not lock the memory it needs (raise RLIMIT_MEMLOCK)";
    default:
      return "io_uring cannot be set up";
  }
}

void* map(int fd, uint64_t nbytes, off_t what) {
  void* base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
  if (base == MAP_FAILED) throw OsError(errno, "mapping the rings of io_uring");
  return base;
}

template <typename T>
T* at(void* base, unsigned offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

}  // namespace

Uring::Uring(unsigned num_entries) {
  io_uring_params params{};
  params.flags = IORING_SETUP_CLAMP;
  fd_ = static_cast<int>(syscall(SYS_io_uring_setup, num_entries, &params));
  if (fd_ < 0) throw OsError(errno, reason(errno));
  // Came with 5.6, as did the plain read and write requests.
  if (!(params.features & IORING_FEAT_RW_CUR_POS)) {
    ::close(fd_);
    throw OsError(ENOSYS, reason(ENOSYS));
  }
  limits_waits_ = params.features & kLimitsWaits;
  try {
    map_rings(params);
  } catch (...) {
    unmap();
    throw;
  }
}

Uring::~Uring() { unmap(); }

void Uring::map_rings(const io_uring_params& params) {
  ring_nbytes_[0] = params.sq_off.array + params.sq_entries * sizeof(unsigned);
  ring_nbytes_[1] = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  rings_[0] = map(fd_, ring_nbytes_[0], IORING_OFF_SQ_RING);
  rings_[1] = map(fd_, ring_nbytes_[1], IORING_OFF_CQ_RING);
  sqes_nbytes_ = params.sq_entries * sizeof(io_uring_sqe);
  sqes_ = static_cast<io_uring_sqe*>(map(fd_, sqes_nbytes_, IORING_OFF_SQES));
  sq_head_ = at<unsigned>(rings_[0], params.sq_off.head);
  sq_tail_ = at<unsigned>(rings_[0], params.sq_off.tail);
  sq_array_ = at<unsigned>(rings_[0], params.sq_off.array);
  sq_mask_ = *at<unsigned>(rings_[0], params.sq_off.ring_mask);
  cq_head_ = at<unsigned>(rings_[1], params.cq_off.head);
  cq_tail_ = at<unsigned>(rings_[1], params.cq_off.tail);
  cqes_ = at<io_uring_cqe>(rings_[1], params.cq_off.cqes);
  cq_mask_ = *at<unsigned>(rings_[1], params.cq_off.ring_mask);
}

void Uring::unmap() {
  if (sqes_) munmap(sqes_, sqes_nbytes_);
  for (int i = 0; i < 2; ++i) {
    if (rings_[i]) munmap(rings_[i], ring_nbytes_[i]);
  }
  ::close(fd_);
}

io_uring_sqe& Uring::prepare() {
  const unsigned index = (*sq_tail_ + num_prepared_) & sq_mask_;
  ++num_prepared_;
  sq_array_[index] = index;
  std::memset(&sqes_[index], 0, sizeof(io_uring_sqe));
  return sqes_[index];
}

void Uring::submit_and_wait(std::optional<std::chrono::nanoseconds> limit) {
  const bool limited = limit && limits_waits_;
  const unsigned flags = IORING_ENTER_GETEVENTS | (limited ? kLimited : 0);
  __kernel_timespec span{};
  WaitArguments arguments{};
  if (limit) {
    span = {limit->count() / 1'000'000'000, limit->count() % 1'000'000'000};
    arguments.span = reinterpret_cast<uint64_t>(&span);
  }
  std::atomic_ref(*sq_tail_).store(*sq_tail_ + num_prepared_, std::memory_order_release);
  unsigned num_left = num_prepared_;
  num_prepared_ = 0;
  for (;;) {
    const long sent = syscall(SYS_io_uring_enter, fd_, num_left, 1, flags,
                              limited ? &arguments : nullptr, limited ? sizeof(arguments) : 0);
    if (sent >= 0) {
      num_left -= static_cast<unsigned>(sent);
      if (num_left == 0) return;
    } else if (limited && num_left == 0 && (errno == ETIME || errno == EINTR)) {
      return;
    } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
      throw OsError(errno, "submitting to io_uring");
    }
  }
}

bool Uring::take_back(uint64_t& user_data) {
  // Outside of io_uring_enter nobody else moves the two ends.
  const unsigned head = std::atomic_ref(*sq_head_).load(std::memory_order_acquire);
  if (head == *sq_tail_) return false;
  user_data = sqes_[sq_array_[head & sq_mask_]].user_data;
  std::atomic_ref(*sq_head_).store(head + 1, std::memory_order_release);
  return true;
}

bool Uring::reap(uint64_t& user_data, int32_t& result) {
  const unsigned head = *cq_head_;
  if (head == std::atomic_ref(*cq_tail_).load(std::memory_order_acquire)) return false;
  const io_uring_cqe& cqe = cqes_[head & cq_mask_];
  user_data = cqe.user_data;
  result = cqe.res;
  std::atomic_ref(*cq_head_).store(head + 1, std::memory_order_release);
  return true;
}

}  // namespace dataeff

#endif
