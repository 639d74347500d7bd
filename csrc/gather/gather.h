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

// Where the CUDA gather reports wrong indices: it never reads or writes out of bounds, counts them,
// and makes their rows zero.
struct BadIndexReport {
  int64_t* count;  // device memory, added to atomically
  int64_t*
      seen;  // pinned host memory, 3 numbers: 1 once there was one, its value, the table's size
};

// Copies of some rows in faster memory than the table's own. Row r is in slot slots[r], and in none
// when that is negative; without `slots` the first `num_rows` rows are in the slots of their own
// number. Every row is in the table too.
struct HotTable {
  const std::byte* data = nullptr;
  int64_t num_rows = 0;  // slots; 0 when there is no such memory
  int64_t row_stride = 0;
  const int32_t* slots = nullptr;
  int64_t* hits = nullptr;  // device memory, added to by the rows found
};

struct RowCoding;

// What a gather may do beside reading one table in the order of the index.
struct GatherOptions {
  HotTable hot;
  const int64_t* places = nullptr;    // row i of the index goes to row places[i] of the output
  const RowCoding* coding = nullptr;  // rows are widened on their way
  int num_blocks = 0;
};

// Queues out[i] = table[index[i]] on `stream` (a cudaStream_t) of `device`. `table` is in host
// memory registered with CUDA, or on the device; `index`, `out` and what `options` points to are on
// the device. `options.num_blocks` bounds the grid, and with it the multiprocessors taken from
// other work; 0 takes the fewest that keep enough bytes in flight for the bus. Throws
// std::runtime_error when the launch is refused, or without CUDA in the build.
void gather_cuda(const RowTable& table, const RowIndex& index, std::byte* out,
                 const BadIndexReport& report, int device, uintptr_t stream,
                 const GatherOptions& options);

}  // namespace dataeff
