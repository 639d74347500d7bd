#include "gather/request_count.h"

#include <algorithm>
#include <array>

#include "gather/gather_index.h"

namespace dataeff {
namespace {

int64_t distinct(std::array<uintptr_t, kWarpLanes>& lines, int size) {
  std::sort(lines.begin(), lines.begin() + size);
  return std::unique(lines.begin(), lines.begin() + size) - lines.begin();
}

template <typename Id>
int64_t of_gather(const GatherTask<Id>& task) {
  int64_t requests = 0;
  for (int64_t load = 0; load < num_loads(task.layout, task.num_ids); ++load) {
    std::array<uintptr_t, kWarpLanes> lines;
    int size = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const WordCopy copy = word_copy(task, load, lane);
      if (copy.begin < copy.end) lines[size++] = copy.word / kLineNbytes;
    }
    requests += distinct(lines, size);
  }
  return requests;
}

// The widest unit, up to a word, that divides the row and its address, 32 of them a load: what a
// gather does that knows no shift.
template <typename Id>
int64_t of_plain(const GatherTask<Id>& task) {
  const RowTable& table = task.table;
  int64_t requests = 0;
  for (int64_t i = 0; i < task.num_ids; ++i) {
    const int64_t id = task.ids[i] < 0 ? task.ids[i] + table.num_rows : task.ids[i];
    const uintptr_t row = reinterpret_cast<uintptr_t>(table.data) + id * table.row_stride;
    const uintptr_t end = row + table.row_nbytes;
    const uint64_t unit = lowest_bit(row | static_cast<uint64_t>(table.row_nbytes) | kWordNbytes);
    for (uintptr_t from = row; from < end; from += kWarpLanes * unit) {
      const uintptr_t last = std::min(from + kWarpLanes * unit, end) - 1;
      requests += static_cast<int64_t>(last / kLineNbytes - from / kLineNbytes + 1);
    }
  }
  return requests;
}

template <typename Id>
RequestCount count(const RowTable& table, const RowIndex& index) {
  const auto* ids = static_cast<const Id*>(index.data);
  const GatherTask<Id> task{table, {}, row_layout(table, {}), ids, index.size, nullptr};
  return {of_gather(task), of_plain(task)};
}

}  // namespace

RequestCount count_requests(const RowTable& table, const RowIndex& index) {
  check_index(index, table.num_rows, 1);
  if (table.row_nbytes == 0) return {0, 0};
  return index.itemsize == 4 ? count<int32_t>(table, index) : count<int64_t>(table, index);
}

}  // namespace dataeff
