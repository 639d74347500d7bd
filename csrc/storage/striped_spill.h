// Several spill files as one place: the fast carry more, the broken are left out.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "storage/engine.h"
#include "storage/spill_space.h"
#include "storage/transfer.h"

namespace dataeff {

class Stripe;

// One directory: its file, its engine, and how it does; guarded by its `StripedSpill`.
struct SpillLane {
  std::shared_ptr<SpillSpace> space;
  std::shared_ptr<Engine> engine;
  int64_t in_flight_nbytes = 0;  // on their way to it
  int64_t written_nbytes = 0;
  double rate = 0;  // running estimate of one write's bytes per nanosecond; 0 before the first
  int64_t num_failures = 0;
  std::string retired;  // why nothing more is written to it; empty while it serves
};

// Bytes [begin, begin + nbytes) of what was written: an extent of one lane.
struct SpillPart {
  SpillLane* lane = nullptr;
  int64_t offset = 0;
  int64_t begin = 0;
  int64_t nbytes = 0;
  std::shared_ptr<Transfer> transfer;  // of the write; none before it is submitted
  bool open = true;                    // its end is not entered in its lane's account
  std::string place() const;
};

// What is written is cut into chunks, and each chunk goes where it will be done first. A lane that
// is full is passed over, one that fails often is retired unless it is the last. Thread-safe.
class StripedSpill : public std::enable_shared_from_this<StripedSpill> {
 public:
  // Without `chunk_nbytes` each write stays in one piece, in one lane.
  explicit StripedSpill(std::optional<int64_t> chunk_nbytes) : chunk_nbytes_(chunk_nbytes) {}

  // All lanes are added before the first write.
  void add(std::shared_ptr<SpillSpace> space, std::shared_ptr<Engine> engine);

  // Begins to write. Whatever happens, `source` is held until no byte of `data` is read any more.
  // Throws OsError (ENOSPC) when no lane has room for a chunk; nothing is kept then.
  std::shared_ptr<Stripe> write(char* data, int64_t nbytes, std::shared_ptr<void> source);

  int64_t used() const;
  int64_t peak() const;
  std::vector<SpillLane> lanes() const;      // a copy: how they do now
  std::vector<std::string> take_warnings();  // what users have to hear, each once

  // Ends all transfers and gives the space back.
  void close();

 private:
  friend class Stripe;
  // An extent in the lane that would be done with it first.
  SpillPart place(int64_t begin, int64_t nbytes, const SpillLane* avoid);
  // Enters the end of a write in its lane's account; `failure` is why it failed, if it did.
  void finished(SpillPart& part, const std::string* failure);
  void note_failure(SpillLane& lane, const std::string& why);

  const std::optional<int64_t> chunk_nbytes_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<SpillLane>> lanes_;
  std::vector<std::string> warnings_;
  int64_t peak_ = 0;
};

// A read of a whole stripe. When it goes, no byte is moved any more, and only then goes `target`.
class StripedRead {
 public:
  StripedRead(std::shared_ptr<Stripe> stripe, std::shared_ptr<void> target)
      : stripe_(std::move(stripe)), target_(std::move(target)) {}
  ~StripedRead();
  StripedRead(const StripedRead&) = delete;
  StripedRead& operator=(const StripedRead&) = delete;

  bool done() const;
  bool wait_for(std::chrono::nanoseconds timeout);  // false when the time is over
  // The first part that failed, once it is done.
  const SpillPart* failed() const;
  const Transfer& under_way() const;  // one that is waited for; only where it is not done
  int64_t start_ns() const;
  int64_t end_ns() const;

 private:
  friend class Stripe;
  const std::shared_ptr<Stripe> stripe_;  // its extents are not given to others meanwhile
  const std::shared_ptr<void> target_;
  std::vector<SpillPart> parts_;
};

// What one `write` stored: a future while it is written, then a place to read from. When it goes,
// its write has ended or was stopped, and then its extents go back. Thread-safe.
class Stripe : public std::enable_shared_from_this<Stripe> {
 public:
  Stripe(std::shared_ptr<StripedSpill> owner, char* data, int64_t nbytes,
         std::shared_ptr<void> source)
      : nbytes(nbytes), owner_(std::move(owner)), data_(data), source_(std::move(source)) {}
  ~Stripe();
  Stripe(const Stripe&) = delete;
  Stripe& operator=(const Stripe&) = delete;

  bool done() const;

  // Waits until everything is written, what a lane refused to another one; false when the time is
  // over. Then `failure` tells whether no lane would take some part, or the write was cancelled.
  bool wait_for(std::chrono::nanoseconds timeout);
  struct Failure {
    int code = 0;
    std::string text;
  };
  std::optional<Failure> failure() const;
  const Transfer& under_way() const;  // one that is waited for; only where it is not done
  StripedSpill& owner() const { return *owner_; }

  // Stops the write if no part of it has begun; true when nothing was or will be written.
  bool cancel();

  // Begins to read everything; the write must have been waited for.
  std::shared_ptr<StripedRead> read(char* data, std::shared_ptr<void> target);

  // Gives the extents back; a write still under way is stopped, or else awaited.
  void free();

  // Lets go of the memory that was written, if nothing of it is under way.
  void drop_source();

  std::string place() const;
  int64_t start_ns() const;
  int64_t end_ns() const;

  const int64_t nbytes;

 private:
  friend class StripedSpill;
  void submit(SpillPart& part);
  void write_elsewhere(SpillPart& part, const Failure& failure);
  void settle();
  bool ended() const;

  const std::shared_ptr<StripedSpill> owner_;
  char* const data_;
  std::mutex waiting_;        // held by who waits, so for as long as the disk takes
  mutable std::mutex mutex_;  // guards what follows, for moments
  std::shared_ptr<void> source_;
  std::vector<SpillPart> parts_;
  std::optional<Failure> failure_;
};

}  // namespace dataeff
