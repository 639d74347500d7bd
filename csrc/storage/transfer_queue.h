// Transfers that wait for their turn, cut into the pieces that an engine moves one at a time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "storage/transfer.h"

namespace dataeff {

// A part of a transfer: bytes [begin, begin + nbytes) of it.
struct Piece {
  std::shared_ptr<Transfer> transfer;
  int64_t begin = 0;
  int64_t nbytes = 0;
};

// First in, first out among reads and among writes; whoever takes says which kind it would rather
// have. Large transfers are spread over several takers. Thread-safe.
class TransferQueue {
 public:
  // Large enough that the cost of a system call vanishes, small enough that one tensor keeps
  // several threads busy; a multiple of every alignment that direct I/O is known to ask for.
  static constexpr int64_t kPieceBytes = int64_t{1} << 20;

  // False when the queue is closed.
  bool push(std::shared_ptr<Transfer> transfer);

  // Waits for a piece; false when the queue is closed and empty.
  bool take(Op preferred, Piece& piece);

  // The same without waiting: false when there is none now.
  bool try_take(Op preferred, Piece& piece);

  // No more pushes. With `cancel`, transfers of which nothing has begun are cancelled.
  void close(bool cancel);
  bool closed() const;

 private:
  struct Entry {
    std::shared_ptr<Transfer> transfer;
    int64_t begin = 0;
  };

  bool take_locked(Op preferred, Piece& piece);
  bool take_from(std::deque<Entry>& entries, Piece& piece);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Entry> entries_[2];  // by Op
  bool closed_ = false;
};

}  // namespace dataeff
