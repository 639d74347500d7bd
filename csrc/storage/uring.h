// A minimal io_uring over raw system calls: one submission and one completion ring, one thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#define DATAEFF_WITH_URING 1
#endif

namespace dataeff {

#ifdef DATAEFF_WITH_URING

// Not thread-safe. At most `num_entries` requests may be outstanding: the completion ring, twice as
// long, then never overflows.
class Uring {
 public:
  // Throws OsError with a reason when the kernel has no io_uring or forbids it.
  explicit Uring(unsigned num_entries);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  // A cleared request to fill in; it is sent by the next `submit_and_wait`.
  io_uring_sqe& prepare();

  // Sends what was prepared and waits until something is complete, or until `limit` has passed or a
  // signal has come, which a kernel before 5.11 does not look for. Throws OsError when the kernel
  // takes no more; `take_back` then says what it did not take.
  void submit_and_wait(std::optional<std::chrono::nanoseconds> limit);

  // The user_data of a request that the kernel has not taken, oldest first, which is then
  // withdrawn; false when there is none.
  bool take_back(uint64_t& user_data);

  // The next completion, if there is one.
  bool reap(uint64_t& user_data, int32_t& result);

 private:
  void map_rings(const io_uring_params& params);
  void unmap();

  int fd_ = -1;
  bool limits_waits_ = false;  // whether the kernel does
  unsigned num_prepared_ = 0;
  void* rings_[2] = {nullptr, nullptr};
  uint64_t ring_nbytes_[2] = {0, 0};
  io_uring_sqe* sqes_ = nullptr;
  uint64_t sqes_nbytes_ = 0;
  // Inside the rings, shared with the kernel.
  unsigned* sq_head_ = nullptr;
  unsigned* sq_tail_ = nullptr;
  unsigned* sq_array_ = nullptr;
  unsigned sq_mask_ = 0;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
  unsigned cq_mask_ = 0;
};

#endif

}  // namespace dataeff
