#include <deque>
#include <exception>
#include <memory>
#include <utility>

#include "errors.h"
#include "memory/host_mapping.h"
#include "storage/run_lane.h"

namespace dataeff {

std::exception_ptr failure_of(const Transfer& transfer) {
  if (transfer.cancelled()) {
    return std::make_exception_ptr(OsError(ECANCELED, transfer.describe() + " was cancelled"));
  }
  const Transfer::Failure* failure = transfer.failure();
  if (!failure) return nullptr;
  if (failure->end_of_file) return std::make_exception_ptr(EndOfFile(failure->text));
  return std::make_exception_ptr(OsError(failure->code, failure->text));
}

bool PollClock::due() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_) return false;
  next_ = now + kPeriod;
  return true;
}

namespace {

class EngineLane final : public RunLane {
 public:
  EngineLane(Shape shape, std::shared_ptr<Engine> engine)
      : shape_(std::move(shape)),
        engine_(std::move(engine)),
        memory_(HostMapping::create(shape_.run_nbytes * shape_.depth, /*shared=*/false)) {}

  void read(RowRuns& runs, const Arrived& arrived, const Poll& poll) override {
    failure_ = nullptr;
    int64_t num_begun = 0;
    for (bool more = true; more || !on_their_way_.empty();) {
      RowRun run;
      if (more && on_their_way_.size() < static_cast<size_t>(shape_.depth)) {
        more = !failure_ && runs.next(run);
        if (more) begin(run, num_begun++ % shape_.depth);
        continue;
      }
      finish_oldest(arrived, poll);
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct UnderWay {
    RowRun run;
    std::shared_ptr<Transfer> transfer;
  };

  void begin(const RowRun& run, int64_t slot) {
    try {
      char* data = memory_->data() + slot * shape_.run_nbytes;
      on_their_way_.push_back({run, engine_->submit(Op::kRead, shape_.fds[run.file], data,
                                                    run.nbytes, run.begin, shape_.run_nbytes)});
    } catch (...) {  // a closed engine
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void finish_oldest(const Arrived& arrived, const Poll& poll) {
    if (on_their_way_.empty()) return;
    const UnderWay oldest = std::move(on_their_way_.front());
    on_their_way_.pop_front();
    while (!oldest.transfer->wait_for(PollClock::kPeriod)) ask(poll);
    if (clock_.due()) ask(poll);
    if (!failure_) failure_ = failure_of(*oldest.transfer);
    if (!failure_) arrived(oldest.run, oldest.transfer->data);
  }

  void ask(const Poll& poll) {
    try {
      if (!failure_) poll();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }

  const Shape shape_;
  const std::shared_ptr<Engine> engine_;
  const std::shared_ptr<HostMapping> memory_;
  std::deque<UnderWay> on_their_way_;  // oldest first; their slots go round
  std::exception_ptr failure_;
  PollClock clock_;
};

}  // namespace

std::unique_ptr<RunLane> make_engine_lane(RunLane::Shape shape, std::shared_ptr<Engine> engine) {
  return std::make_unique<EngineLane>(std::move(shape), std::move(engine));
}

}  // namespace dataeff
