// Carries out the runs of a batch, many at a time, and hands over each as it arrives.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "storage/engine.h"
#include "storage/row_runs.h"

namespace dataeff {

// For one batch at a time. The memory of a run is the lane's: it is overwritten after `arrived`
// returns.
class RunLane {
 public:
  using Arrived = std::function<void(const RowRun& run, const char* data)>;
  // Called now and then while a batch is under way; an exception of it ends the batch.
  using Poll = std::function<void()>;

  // What the runs of a table need.
  struct Shape {
    std::vector<int> fds;
    std::vector<Alignment> alignments;  // of each fd
    int64_t run_nbytes;                 // room for one run, whole pages
    int depth;                          // runs on their way at one time
  };

  virtual ~RunLane() = default;

  // Reads every run. When one fails, or `poll` throws, those on their way are awaited, no more are
  // begun, and the first failure is thrown: OsError, EndOfFile or what `poll` threw.
  virtual void read(RowRuns& runs, const Arrived& arrived, const Poll& poll) = 0;
};

// Keeps `depth` requests with the kernel from the calling thread. Throws OsError where io_uring is
// refused.
std::unique_ptr<RunLane> make_uring_lane(RunLane::Shape shape, std::shared_ptr<FaultPlan> faults);

// Reads through an engine, which several lanes may share.
std::unique_ptr<RunLane> make_engine_lane(RunLane::Shape shape, std::shared_ptr<Engine> engine);

// The failure of a transfer as an exception.
std::exception_ptr failure_of(const Transfer& transfer);

// Says, about every 100 ms, that it is time to poll.
class PollClock {
 public:
  static constexpr std::chrono::milliseconds kPeriod{100};

  bool due();

 private:
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kPeriod;
};

}  // namespace dataeff
