#include "storage/row_runs.h"

#include <algorithm>
#include <utility>

namespace dataeff {
namespace {

// A hole this long costs a disk less to read than another request.
constexpr int64_t kMaxHole = RowRuns::kPage;

int64_t page_floor(int64_t offset) { return offset / RowRuns::kPage * RowRuns::kPage; }
int64_t page_ceil(int64_t offset) { return page_floor(offset + RowRuns::kPage - 1); }

}  // namespace

RowRuns::RowRuns(std::vector<WantedRow> wanted, int64_t row_nbytes, int64_t max_run_nbytes)
    : wanted_(std::move(wanted)), row_nbytes_(row_nbytes), max_run_nbytes_(max_run_nbytes) {
  std::sort(wanted_.begin(), wanted_.end(),
            [](const WantedRow& a, const WantedRow& b) { return a.place < b.place; });
}

bool RowRuns::next(RowRun& run) {
  if (next_ == wanted_.size()) return false;
  const RowPlace start = wanted_[next_].place;
  run = {start.file(), page_floor(start.offset()), 0, next_, next_ + 1};
  int64_t end = start.offset() + row_nbytes_;
  for (; run.last < wanted_.size(); ++run.last) {
    const RowPlace place = wanted_[run.last].place;
    const int64_t row_end = place.offset() + row_nbytes_;
    if (place.file() != run.file || page_floor(place.offset()) > page_ceil(end) + kMaxHole) break;
    if (page_ceil(row_end) - run.begin > max_run_nbytes_) break;
    end = row_end;
  }
  run.nbytes = end - run.begin;
  next_ = run.last;
  return true;
}

}  // namespace dataeff
