// From the rows of a batch to the reads that fetch them: sorted, de-duplicated, coalesced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "storage/row_layout.h"

namespace dataeff {

// A row of a batch that has to come from its file.
struct WantedRow {
  RowPlace place;
  int64_t position;  // in the batch
};

// One read: `nbytes` bytes from byte `begin` of a file, holding the wanted rows [first, last).
// `begin` is a multiple of the page; the end is the last row's, which a file that ends inside a
// page must still satisfy.
struct RowRun {
  int file;
  int64_t begin;
  int64_t nbytes;
  size_t first;
  size_t last;
};

// Hands out the runs of a batch one by one. Rows that share pages, touch, or leave a hole of at
// most a page share a run, up to `max_run_nbytes`; a longer row is a run of its own.
class RowRuns {
 public:
  static constexpr int64_t kPage = 4096;

  // Sorts `wanted`.
  RowRuns(std::vector<WantedRow> wanted, int64_t row_nbytes, int64_t max_run_nbytes);

  // False when there are no more.
  bool next(RowRun& run);

  const std::vector<WantedRow>& wanted() const { return wanted_; }

 private:
  std::vector<WantedRow> wanted_;
  const int64_t row_nbytes_;
  const int64_t max_run_nbytes_;
  size_t next_ = 0;
};

}  // namespace dataeff
