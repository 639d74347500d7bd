#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "errors.h"
#include "memory/host_mapping.h"
#include "storage/piece_io.h"
#include "storage/run_lane.h"
#include "storage/uring.h"

namespace dataeff {

#ifdef DATAEFF_WITH_URING
namespace {

constexpr uint64_t kPause = uint64_t{1} << 63;  // user_data of the end of a slot's pause

// Unlike the engine's loop this one runs in the thread that waits for the rows: no wake-up and no
// lock lies between a completion and the copy of its rows.
class UringLane final : public RunLane {
 public:
  UringLane(Shape shape, std::shared_ptr<FaultPlan> faults)
      : shape_(std::move(shape)),
        faults_(std::move(faults)),
        uring_(shape_.depth),
        memory_(HostMapping::create(shape_.run_nbytes * shape_.depth, /*shared=*/false)),
        slots_(shape_.depth) {
    for (int i = shape_.depth - 1; i >= 0; --i) idle_.push_back(i);
  }

  void read(RowRuns& runs, const Arrived& arrived, const Poll& poll) override {
    failure_ = nullptr;
    arrived_ = &arrived;
    for (bool more = true;;) {
      RowRun run;
      while (more && !idle_.empty() && (more = !failure_ && runs.next(run))) {
        begin(run);
        if (lost_) break;  // which has read it: time to poll
      }
      if (idle_.size() == slots_.size() && !more) break;
      if (idle_.size() < slots_.size()) wait();  // else every run so far ended without the kernel
      if (clock_.due() && !failure_) ask(poll);
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Slot {
    RowRun run{};
    std::optional<PieceIo> io;
    PieceIo::Attempt attempt;
    BounceBuffer bounce;
    __kernel_timespec pause{};
  };

  void begin(const RowRun& run) {
    const int index = idle_.back();
    idle_.pop_back();
    Slot& slot = slots_[index];
    slot.run = run;
    auto transfer = std::make_shared<Transfer>(
        Op::kRead, shape_.fds[run.file], memory_->data() + index * shape_.run_nbytes, run.nbytes,
        run.begin, shape_.alignments[run.file], shape_.run_nbytes);
    transfer->begin();
    slot.io.emplace(Piece{std::move(transfer), 0, run.nbytes}, slot.bounce, faults_.get());
    attempt(index);
  }

  void wait() {
    try {
      uring_.submit_and_wait();
    } catch (const OsError&) {
      go_on_without_ring();
    }
    reap();
  }

  void reap() {
    uint64_t user_data;
    int32_t result;
    while (uring_.reap(user_data, result)) complete(user_data, result);
  }

  // As in the engine: what the kernel has taken ends without being asked for and is awaited, since
  // it is written to this lane's memory; the rest, and all that follows, is read by blocking calls.
  void go_on_without_ring() {
    lost_ = true;
    uint64_t user_data;
    while (uring_.take_back(user_data)) send(static_cast<int>(user_data & ~kPause));
    while (idle_.size() < slots_.size()) {
      std::this_thread::sleep_for(std::chrono::microseconds{100});
      reap();
    }
  }

  // Starts the slot's next attempt, after its pause.
  void attempt(int index) {
    Slot& slot = slots_[index];
    slot.attempt = slot.io->next();
    const int64_t pause_ns = slot.attempt.pause.count();
    if (pause_ns > 0 && lost_) std::this_thread::sleep_for(slot.attempt.pause);
    if (pause_ns == 0 || lost_) {
      send(index);
      return;
    }
    slot.pause = {pause_ns / 1'000'000'000, pause_ns % 1'000'000'000};
    io_uring_sqe& sqe = uring_.prepare();
    sqe.opcode = IORING_OP_TIMEOUT;
    sqe.addr = reinterpret_cast<uint64_t>(&slot.pause);
    sqe.len = 1;
    sqe.user_data = kPause | index;
  }

  void send(int index) {
    Slot& slot = slots_[index];
    if (slot.attempt.fault.error) {
      advance(index, -slot.attempt.fault.error);
      return;
    }
    if (lost_) {
      advance(index, slot.io->call(slot.attempt));
      return;
    }
    io_uring_sqe& sqe = uring_.prepare();
    sqe.opcode = IORING_OP_READ;
    sqe.fd = slot.io->transfer().fd;
    sqe.addr = reinterpret_cast<uint64_t>(slot.attempt.data);
    sqe.len = static_cast<uint32_t>(std::min<int64_t>(slot.attempt.nbytes, 1 << 30));
    sqe.off = slot.attempt.offset;
    sqe.user_data = index;
  }

  void complete(uint64_t user_data, int32_t result) {
    if (user_data & kPause) {
      send(static_cast<int>(user_data & ~kPause));
    } else {
      advance(static_cast<int>(user_data), result);
    }
  }

  void advance(int index, int64_t result) {
    Slot& slot = slots_[index];
    if (!slot.io->advance(slot.attempt, result)) {
      attempt(index);
      return;
    }
    const Transfer& transfer = slot.io->transfer();
    if (!failure_) failure_ = failure_of(transfer);
    if (!failure_) (*arrived_)(slot.run, transfer.data);
    slot.io.reset();
    idle_.push_back(index);
  }

  void ask(const Poll& poll) {
    try {
      poll();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }

  const Shape shape_;
  const std::shared_ptr<FaultPlan> faults_;
  Uring uring_;
  const std::shared_ptr<HostMapping> memory_;
  std::vector<Slot> slots_;
  std::vector<int> idle_;
  const Arrived* arrived_ = nullptr;
  std::exception_ptr failure_;
  PollClock clock_;
  bool lost_ = false;  // the ring takes no more
};

}  // namespace
#endif

std::unique_ptr<RunLane> make_uring_lane(RunLane::Shape shape, std::shared_ptr<FaultPlan> faults) {
#ifdef DATAEFF_WITH_URING
  return std::make_unique<UringLane>(std::move(shape), std::move(faults));
#else
  throw OsError(ENOSYS, "dataeff was built without linux/io_uring.h (Linux headers 5.6 or later)");
#endif
}

}  // namespace dataeff
