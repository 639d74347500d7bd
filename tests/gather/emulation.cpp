// The lanes of the CUDA gather's warps, run one after another on the host, with the requests that
// the loads of each warp would make over the bus.
#include <cstring>
#include <set>

#include "gather/gather_index.h"

using namespace dataeff;

struct Counts {
  int64_t loads;        // of whole warps
  int64_t requests;     // distinct 128-byte lines, load by load
  int64_t words;        // lanes that read
  int64_t bad;          // wrong indices reported
  int64_t stray_words;  // words without a byte of the table
};

template <typename Id>
static Counts emulate(const RowTable& table, const Id* ids, int64_t num_ids, std::byte* out) {
  Counts counts{};
  const RowLayout layout = row_layout(table);
  const auto table_begin = reinterpret_cast<uintptr_t>(table.data);
  const auto table_end = table_begin + (table.num_rows - 1) * table.row_stride + table.row_nbytes;
  const auto store_word = [](uintptr_t to, const Word& word) {
    if (to % kWordNbytes) __builtin_trap();
    std::memcpy(reinterpret_cast<void*>(to), &word, sizeof word);
  };
  counts.loads = num_loads(layout, num_ids);
  // Two loads more than needed, as the unrolled kernel makes: they must do nothing.
  for (int64_t load = 0; load < counts.loads + 2; ++load) {
    std::set<uintptr_t> lines;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const WordCopy copy = word_copy(table, layout, ids, num_ids, out, load, lane);
      Word word{0, 0};
      if (copy.begin < copy.end && copy.readable) {
        if (copy.word % kWordNbytes) __builtin_trap();
        std::memcpy(&word, reinterpret_cast<const void*>(copy.word), sizeof word);
        lines.insert(copy.word / kLineNbytes);
        ++counts.words;
        counts.stray_words += copy.word >= table_end || copy.word + kWordNbytes <= table_begin;
      }
      store_copy(copy, word, store_word);
      counts.bad += copy.first_lane && !copy.readable;
    }
    counts.requests += lines.size();
  }
  return counts;
}

extern "C" void emulate_gather(std::byte* data, int64_t num_rows, int64_t row_nbytes,
                               int64_t row_stride, const void* ids, int64_t num_ids, int itemsize,
                               std::byte* out, Counts* counts) {
  const RowTable table{data, num_rows, row_nbytes, row_stride};
  *counts = itemsize == 4 ? emulate(table, static_cast<const int32_t*>(ids), num_ids, out)
                          : emulate(table, static_cast<const int64_t*>(ids), num_ids, out);
}
