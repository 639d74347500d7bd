// Pieces on their way through one ring: attempts, pauses, and what is done when the ring is lost.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "storage/piece_io.h"
#include "storage/uring.h"

namespace dataeff {

#ifdef DATAEFF_WITH_URING

// A slot for each piece under way; whoever derives says where pieces come from and what becomes of
// those that have ended. For one thread.
class UringPieces {
 public:
  UringPieces(const UringPieces&) = delete;
  UringPieces& operator=(const UringPieces&) = delete;

 protected:
  static constexpr uint64_t kOther = uint64_t{1} << 62;  // user_data of no piece

  // Args:
  //   depth: pieces under way at one time.
  //   num_others: requests of user_data `kOther` at one time.
  //   faults: may be null.
  UringPieces(int depth, int num_others, FaultPlan* faults);
  virtual ~UringPieces() = default;

  bool idle() const { return idle_.size() == slots_.size(); }
  bool full() const { return idle_.empty(); }
  int num_idle() const { return static_cast<int>(idle_.size()); }
  // The slot that `begin` takes next.
  int next() const { return idle_.back(); }

  // Moves the piece in the next slot. In a ring that is lost it has ended when this returns.
  void begin(Piece piece);

  // Sends what was begun and waits until some of it has ended, or `limit` has passed. When the
  // kernel takes no more (its descriptor was closed by somebody, say) it waits for what the kernel
  // has taken, and moves the rest, and all that follows, by blocking calls.
  void wait(std::optional<std::chrono::nanoseconds> limit = {});

  bool lost() const { return lost_; }

  // The piece in slot `index` has ended, well or not; the slot is free when this returns.
  virtual void ended(int /*index*/, const Transfer& /*transfer*/) {}

  // Whether requests are left to the kernel's threads.
  virtual bool in_parallel() const { return false; }

  // A request of user_data `kOther` is complete.
  virtual void other() {}

  // Empty when the ring is given back.
  std::optional<Uring> uring_;

 private:
  // Its memory stays in place while the kernel has the request.
  struct Slot {
    std::optional<PieceIo> io;
    PieceIo::Attempt attempt;
    BounceBuffer bounce;
    __kernel_timespec pause{};
  };

  void go_on_without_ring();
  void reap();
  void attempt(int index);
  void send(int index);
  void advance(int index, int64_t result);

  std::vector<Slot> slots_;
  std::vector<int> idle_;
  FaultPlan* const faults_;
  bool lost_ = false;  // the ring takes no more
};

#endif

}  // namespace dataeff
