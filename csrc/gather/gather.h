// Row gather and scatter: out[i] = table[index[i]] and table[index[i]] = rows[i], on raw bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dataeff {

// `num_rows` rows of `row_nbytes` bytes; row r starts at data + r * row_stride. Any alignment; the
// stride may be larger or smaller than a row, zero or negative.
struct RowTable {
  std::byte* data;
  int64_t num_rows;
  int64_t row_nbytes;
  int64_t row_stride;
};

// Row numbers, int32 (itemsize 4) or int64 (itemsize 8), each in [-num_rows, num_rows).
struct RowIndex {
  const void* data;
  int64_t size;
  int itemsize;
};

// Throws std::out_of_range naming the first index outside [-num_rows, num_rows).
void check_index(const RowIndex& index, int64_t num_rows, int num_threads);

// Copies row index[i] to out + i * row_nbytes. The whole index is checked before the first byte is
// written, so a wrong one leaves `out` as it was.
void gather_cpu(const RowTable& table, const RowIndex& index, std::byte* out, int num_threads);

// Copies rows + i * row_nbytes to row index[i]. Where an index occurs twice the later row stays,
// whatever the number of threads. Checked first, like gather_cpu.
void scatter_cpu(const RowTable& table, const RowIndex& index, const std::byte* rows,
                 int num_threads);

}  // namespace dataeff
