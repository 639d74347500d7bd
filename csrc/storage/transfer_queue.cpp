#include "storage/transfer_queue.h"

#include <algorithm>

namespace dataeff {

bool TransferQueue::push(std::shared_ptr<Transfer> transfer) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return false;
    if (transfer->done()) return true;  // nothing to move
    entries_[static_cast<int>(transfer->op)].push_back({std::move(transfer)});
  }
  changed_.notify_one();
  return true;
}

bool TransferQueue::take(Op preferred, Piece& piece) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (take_locked(preferred, piece)) {
      // Whoever pushed has work to do: takers wake one another, while there is more to take.
      const bool more = !entries_[0].empty() || !entries_[1].empty();
      lock.unlock();
      if (more) changed_.notify_one();
      return true;
    }
    if (closed_) return false;
    changed_.wait(lock);
  }
}

bool TransferQueue::try_take(Op preferred, Piece& piece) {
  std::lock_guard lock(mutex_);
  return take_locked(preferred, piece);
}

void TransferQueue::close(bool cancel) {
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    if (cancel) {
      for (auto& entries : entries_) {
        for (Entry& entry : entries) entry.transfer->cancel();
      }
    }
  }
  changed_.notify_all();
}

bool TransferQueue::closed() const {
  std::lock_guard lock(mutex_);
  return closed_;
}

bool TransferQueue::take_locked(Op preferred, Piece& piece) {
  const int first = static_cast<int>(preferred);
  return take_from(entries_[first], piece) || take_from(entries_[1 - first], piece);
}

bool TransferQueue::take_from(std::deque<Entry>& entries, Piece& piece) {
  while (!entries.empty()) {
    Entry& entry = entries.front();
    Transfer& transfer = *entry.transfer;
    if (entry.begin == 0 && !transfer.begin()) {  // cancelled while it waited
      entries.pop_front();
      continue;
    }
    const int64_t left = transfer.nbytes - entry.begin;
    if (transfer.failed()) {  // what is left of it would be wasted work
      const auto skipped = std::move(entry.transfer);
      entries.pop_front();
      skipped->account(left);
      continue;
    }
    piece = {entry.transfer, entry.begin, std::min(left, kPieceBytes)};
    entry.begin += piece.nbytes;
    if (entry.begin == transfer.nbytes) entries.pop_front();
    return true;
  }
  return false;
}

}  // namespace dataeff
