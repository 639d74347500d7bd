// The gradient of a gather: rows of one number summed, in the order in which they come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "gather/gather.h"
#include "gather/row_format.h"

namespace dataeff {

// Where each row of a table is named by an index.
class NamedRows {
 public:
  // Leaves out row `padding`; negative for none. Throws std::out_of_range for a number outside
  // [-num_rows, num_rows), std::invalid_argument where numbers or places take more than 32 bits.
  NamedRows(const RowIndex& index, int64_t num_rows, int64_t padding);

  // The number of different rows.
  int64_t size() const { return size_; }

  // Writes the different rows, ascending, to ids[i * stride].
  void write_ids(int64_t* ids, int64_t stride) const;

  // sums[i] = the sum of rows[p] for each place p where the i-th of the different rows is named, in
  // the order of p: the same bits at any number of threads. Rows have `width` elements; those of
  // 16 bits are summed in float32 and rounded once.
  void sum(Element element, const std::byte* rows, int64_t width, std::byte* sums,
           int num_threads) const;

 private:
  template <typename Out>
  void sum_as(const typename Out::Value* rows, int64_t width, typename Out::Value* sums,
              int num_threads, auto copy) const;
  int64_t place(int64_t i) const { return static_cast<uint32_t>(named_[i]); }

  int64_t num_named_ = 0;
  int64_t size_ = 0;
  std::unique_ptr<uint64_t[]> named_{};   // row << 32 | place, ascending
  std::unique_ptr<uint32_t[]> begins_{};  // of each different row in named_, and the end
};

// Whether each of the ids is above the one before: sorted, and none twice.
bool strictly_ascending(const int64_t* ids, int64_t size);

}  // namespace dataeff
