#include "storage/row_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace dataeff {
namespace {

constexpr int64_t kMaxFiles = int64_t{1} << (63 - RowPlace::kOffsetBits);

// Rows of the segment that its `index`th file holds.
int64_t rows_in_file(const RowSegment& segment, int64_t index) {
  const int64_t num_files = static_cast<int64_t>(segment.files.size());
  const int64_t round = segment.rows_per_extent * num_files;
  const int64_t whole = segment.num_rows / round;
  const int64_t rest = segment.num_rows % round - index * segment.rows_per_extent;
  return whole * segment.rows_per_extent + std::clamp<int64_t>(rest, 0, segment.rows_per_extent);
}

}  // namespace

RowLayout::RowLayout(std::vector<RowSegment> segments, int64_t row_nbytes)
    : row_nbytes_(row_nbytes) {
  if (row_nbytes < 0) throw std::invalid_argument("row_nbytes is negative");
  for (RowSegment& segment : segments) add(std::move(segment));
}

void RowLayout::add(RowSegment segment) {
  if (segment.files.empty() || segment.rows_per_extent < 1 || segment.num_rows < 0 ||
      segment.offset < 0) {
    throw std::invalid_argument("a segment needs a file, an extent of rows, and no negative count");
  }
  const int first_file = static_cast<int>(files_.size());
  for (size_t i = 0; i < segment.files.size(); ++i) {
    const int64_t end = segment.offset + rows_in_file(segment, i) * row_nbytes_;
    if (end > segment.files[i].nbytes || end >> RowPlace::kOffsetBits) {
      throw std::invalid_argument("file " + std::to_string(first_file + i) + " has " +
                                  std::to_string(segment.files[i].nbytes) +
                                  " bytes but its rows end at byte " + std::to_string(end));
    }
    files_.push_back(segment.files[i]);
  }
  if (static_cast<int64_t>(files_.size()) > kMaxFiles) {
    throw std::invalid_argument("a table has at most " + std::to_string(kMaxFiles) + " files");
  }
  const int64_t first_row = num_rows_;
  num_rows_ += segment.num_rows;
  segments_.push_back({std::move(segment), first_row, first_file});
}

RowPlace RowLayout::place(int64_t row) const {
  const auto after =
      std::upper_bound(segments_.begin(), segments_.end(), row,
                       [](int64_t row, const Placed& placed) { return row < placed.first_row; });
  const Placed& placed = *(after - 1);
  const RowSegment& segment = placed.segment;
  row -= placed.first_row;
  const int64_t num_files = static_cast<int64_t>(segment.files.size());
  if (num_files == 1) return {placed.first_file, segment.offset + row * row_nbytes_};
  const int64_t extent = row / segment.rows_per_extent;
  const int64_t before =
      extent / num_files * segment.rows_per_extent + row % segment.rows_per_extent;
  return {placed.first_file + static_cast<int>(extent % num_files),
          segment.offset + before * row_nbytes_};
}

}  // namespace dataeff
