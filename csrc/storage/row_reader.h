// Gathers rows that are in files: hits from a cache in host memory, misses by batched page reads.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "gather/gather.h"
#include "storage/row_cache.h"
#include "storage/row_layout.h"
#include "storage/run_lane.h"

namespace dataeff {

// Thread-safe: each batch under way has a lane of its own.
class RowReader {
 public:
  // What has been delivered so far.
  struct Counts {
    int64_t num_hits = 0;     // rows from the cache
    int64_t num_misses = 0;   // rows from the files
    int64_t num_reads = 0;    // requests to the files
    int64_t nbytes_read = 0;  // by them, whole blocks of direct I/O
  };

  // Reads by io_uring, or through `engine` when there is one. A cache of 0 bytes is none. Throws
  // OsError where io_uring is refused or an fd is bad, std::invalid_argument for a depth or a cache
  // that makes no sense.
  RowReader(RowLayout layout, int queue_depth, int64_t cache_nbytes, std::shared_ptr<Engine> engine,
            std::shared_ptr<FaultPlan> faults);

  // out[i] = rows[index[i]]. The whole index is checked first (std::out_of_range); a read that
  // fails throws after the others of the batch have ended, and leaves `out` partly written.
  // Returns how many rows came from the cache.
  int64_t gather(const RowIndex& index, std::byte* out, int num_threads, const RunLane::Poll& poll);

  Counts counts() const;
  int64_t num_cache_rows() const { return cache_ ? cache_->num_slots() : 0; }
  int queue_depth() const { return shape_.depth; }

 private:
  class LaneLease;

  std::unique_ptr<RunLane> make_lane() const;
  std::vector<WantedRow> serve_hits(const RowIndex& index, std::byte* out);
  void deliver(const RowRun& run, const char* data, const RowRuns& runs, const RowIndex& index,
               std::byte* out);

  const RowLayout layout_;
  RunLane::Shape shape_;
  int64_t max_run_nbytes_;
  const std::shared_ptr<Engine> engine_;
  const std::shared_ptr<FaultPlan> faults_;

  std::mutex cache_mutex_;
  std::unique_ptr<RowCache> cache_;

  std::mutex lanes_mutex_;
  std::vector<std::unique_ptr<RunLane>> idle_lanes_;

  std::atomic<int64_t> num_hits_{0};
  std::atomic<int64_t> num_misses_{0};
  std::atomic<int64_t> num_reads_{0};
  std::atomic<int64_t> nbytes_read_{0};
};

}  // namespace dataeff
