#include "storage/row_reader.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace dataeff {
namespace {

// Sixteen pages: enough for dense batches to move in large requests, little enough that a queue of
// them stays in the second-level cache.
constexpr int64_t kMaxRunNbytes = 64 << 10;
// The most that the requests of one lane may hold, unless a single row is longer.
constexpr int64_t kMaxLaneNbytes = 64 << 20;

int64_t row_at(const RowIndex& index, int64_t position, int64_t num_rows) {
  const int64_t row = index.itemsize == 4 ? static_cast<const int32_t*>(index.data)[position]
                                          : static_cast<const int64_t*>(index.data)[position];
  return row < 0 ? row + num_rows : row;
}

}  // namespace

// Takes an idle lane or makes one, and gives it back.
class RowReader::LaneLease {
 public:
  explicit LaneLease(RowReader& reader) : reader_(reader) {
    {
      std::lock_guard lock(reader.lanes_mutex_);
      if (!reader.idle_lanes_.empty()) {
        lane_ = std::move(reader.idle_lanes_.back());
        reader.idle_lanes_.pop_back();
        return;
      }
    }
    lane_ = reader.make_lane();
  }
  ~LaneLease() {
    std::lock_guard lock(reader_.lanes_mutex_);
    reader_.idle_lanes_.push_back(std::move(lane_));
  }
  RunLane* operator->() { return lane_.get(); }

 private:
  RowReader& reader_;
  std::unique_ptr<RunLane> lane_;
};

RowReader::RowReader(RowLayout layout, int queue_depth, int64_t cache_nbytes,
                     std::shared_ptr<Engine> engine, std::shared_ptr<FaultPlan> faults)
    : layout_(std::move(layout)), engine_(std::move(engine)), faults_(std::move(faults)) {
  if (queue_depth < 1 || queue_depth > 4096) {
    throw std::invalid_argument("queue_depth=" + std::to_string(queue_depth) +
                                " is not between 1 and 4096");
  }
  if (cache_nbytes < 0) {
    throw std::invalid_argument("a cache of " + std::to_string(cache_nbytes) + " bytes");
  }
  for (const RowFile& file : layout_.files()) {
    shape_.fds.push_back(file.fd);
    shape_.alignments.push_back(alignment_of(file.fd));
  }
  // A row may begin at a page's last byte.
  const int64_t longest = round_up(layout_.row_nbytes(), RowRuns::kPage) + RowRuns::kPage;
  max_run_nbytes_ = shape_.run_nbytes = std::max(kMaxRunNbytes, longest);
  shape_.depth =
      static_cast<int>(std::clamp<int64_t>(kMaxLaneNbytes / shape_.run_nbytes, 1, queue_depth));
  if (layout_.row_nbytes() == 0 || layout_.num_rows() == 0) return;
  if (cache_nbytes > 0) {
    cache_ = RowCache::create(cache_nbytes, layout_.row_nbytes(), layout_.num_rows());
  }
  idle_lanes_.push_back(make_lane());  // a machine that refuses io_uring says so now
}

std::unique_ptr<RunLane> RowReader::make_lane() const {
  return engine_ ? make_engine_lane(shape_, engine_) : make_uring_lane(shape_, faults_);
}

int64_t RowReader::gather(const RowIndex& index, std::byte* out, int num_threads,
                          const RunLane::Poll& poll) {
  check_index(index, layout_.num_rows(), num_threads);
  if (layout_.row_nbytes() == 0 || index.size == 0) return 0;
  RowRuns runs(serve_hits(index, out), layout_.row_nbytes(), max_run_nbytes_);
  const int64_t num_hits = index.size - static_cast<int64_t>(runs.wanted().size());
  if (runs.wanted().empty()) return num_hits;
  LaneLease lane(*this);
  lane->read(
      runs, [&](const RowRun& run, const char* data) { deliver(run, data, runs, index, out); },
      poll);
  return num_hits;
}

// Copies what the cache has; returns the rest.
std::vector<WantedRow> RowReader::serve_hits(const RowIndex& index, std::byte* out) {
  const int64_t row_nbytes = layout_.row_nbytes();
  std::vector<WantedRow> wanted;
  wanted.reserve(index.size);
  std::unique_lock lock(cache_mutex_, std::defer_lock);
  if (cache_) lock.lock();
  for (int64_t i = 0; i < index.size; ++i) {
    const int64_t row = row_at(index, i, layout_.num_rows());
    if (const char* cached = cache_ ? cache_->find(row) : nullptr) {
      std::memcpy(out + i * row_nbytes, cached, row_nbytes);
    } else {
      wanted.push_back({layout_.place(row), i});
    }
  }
  num_hits_ += index.size - static_cast<int64_t>(wanted.size());
  return wanted;
}

// Copies the rows of a run to their places in `out`, whatever their alignment, and caches them.
void RowReader::deliver(const RowRun& run, const char* data, const RowRuns& runs,
                        const RowIndex& index, std::byte* out) {
  const int64_t row_nbytes = layout_.row_nbytes();
  std::unique_lock lock(cache_mutex_, std::defer_lock);
  if (cache_) lock.lock();
  for (size_t i = run.first; i < run.last; ++i) {
    const WantedRow& wanted = runs.wanted()[i];
    const char* row = data + (wanted.place.offset() - run.begin);
    std::memcpy(out + wanted.position * row_nbytes, row, row_nbytes);
    if (cache_) cache_->insert(row_at(index, wanted.position, layout_.num_rows()), row);
  }
  num_misses_ += static_cast<int64_t>(run.last - run.first);
  ++num_reads_;
  nbytes_read_ += round_up(run.nbytes, shape_.alignments[run.file].block);
}

RowReader::Counts RowReader::counts() const {
  return {num_hits_, num_misses_, num_reads_, nbytes_read_};
}

}  // namespace dataeff
