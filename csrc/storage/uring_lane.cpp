#include <chrono>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "errors.h"
#include "memory/host_mapping.h"
#include "storage/run_lane.h"
#include "storage/uring_pieces.h"

namespace dataeff {

#ifdef DATAEFF_WITH_URING
namespace {

// Unlike the engine's loop this one runs in the thread that waits for the rows: no wake-up and no
// lock lies between a completion and the copy of its rows.
class UringLane final : public RunLane, private UringPieces {
 public:
  UringLane(Shape shape, std::shared_ptr<FaultPlan> faults)
      : UringPieces(shape.depth, /*num_others=*/0, faults.get()),
        shape_(std::move(shape)),
        faults_(std::move(faults)),
        memory_(HostMapping::create(shape_.run_nbytes * shape_.depth, /*shared=*/false)),
        runs_(shape_.depth) {}

  void read(RowRuns& runs, const Arrived& arrived, const Poll& poll) override {
    failure_ = nullptr;
    arrived_ = &arrived;
    for (bool more = true;;) {
      RowRun run;
      while (more && !full() && (more = !failure_ && runs.next(run))) {
        begin_run(run);
        if (lost()) break;  // which has read it: time to poll
      }
      if (idle() && !more) break;
      // A disk may hang for longer than until the next poll.
      if (!idle()) wait(PollClock::kPeriod);  // else all runs so far ended without the kernel
      if (clock_.due() && !failure_) ask(poll);
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void begin_run(const RowRun& run) {
    const int index = next();
    runs_[index] = run;
    auto transfer = std::make_shared<Transfer>(
        Op::kRead, shape_.fds[run.file], memory_->data() + index * shape_.run_nbytes, run.nbytes,
        run.begin, shape_.alignments[run.file], shape_.run_nbytes);
    transfer->begin();
    begin(Piece{std::move(transfer), 0, run.nbytes});
  }

  void ended(int index, const Transfer& transfer) override {
    if (!failure_) failure_ = failure_of(transfer);
    if (!failure_) (*arrived_)(runs_[index], transfer.data);
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
  const std::shared_ptr<HostMapping> memory_;
  std::vector<RowRun> runs_;  // by slot
  const Arrived* arrived_ = nullptr;
  std::exception_ptr failure_;
  PollClock clock_;
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
