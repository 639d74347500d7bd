// The lanes of the CUDA gather's warps, run one after another on the host, with the requests that
// the loads of each warp would make over the bus.
#include <cstring>
#include <set>

#include "gather/decode_store.h"
#include "gather/gather_index.h"

using namespace dataeff;

struct Counts {
  int64_t loads;        // of whole warps
  int64_t requests;     // distinct 128-byte lines of the table, load by load
  int64_t words;        // lanes that read
  int64_t bad;          // wrong indices reported
  int64_t stray_words;  // words without a byte of the table or of the hot rows
  int64_t hits;         // rows found among the hot ones
};

struct Span {
  uintptr_t begin, end;
  bool has(uintptr_t word) const { return word < end && word + kWordNbytes > begin; }
};

static Span span_of(const void* data, int64_t num_rows, int64_t row_nbytes, int64_t row_stride) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  return {first, num_rows ? first + (num_rows - 1) * row_stride + row_nbytes : first};
}

template <typename Id, typename Store>
static Counts emulate(const GatherTask<Id>& task, const Store& store) {
  Counts counts{};
  const RowTable& table = task.table;
  const HotTable& hot = task.hot;
  const Span cold_span = span_of(table.data, table.num_rows, table.row_nbytes, table.row_stride);
  const Span hot_span = span_of(hot.data, hot.num_rows, table.row_nbytes, hot.row_stride);
  const auto store_word = [](uintptr_t to, const Word& word) {
    if (to % kWordNbytes) __builtin_trap();
    std::memcpy(reinterpret_cast<void*>(to), &word, sizeof word);
  };
  counts.loads = num_loads(task.layout, task.num_ids);
  // Two loads more than needed, as the unrolled kernel makes: they must do nothing.
  for (int64_t load = 0; load < counts.loads + 2; ++load) {
    std::set<uintptr_t> lines;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const WordCopy copy = word_copy(task, load, lane);
      Word word{0, 0};
      if (copy.begin < copy.end && copy.readable) {
        if (copy.word % kWordNbytes) __builtin_trap();
        std::memcpy(&word, reinterpret_cast<const void*>(copy.word), sizeof word);
        if (!copy.hot) lines.insert(copy.word / kLineNbytes);
        ++counts.words;
        counts.stray_words += !(copy.hot ? hot_span : cold_span).has(copy.word);
      }
      store(copy, word, store.scale_of(copy), store_word);
      counts.bad += copy.first_lane && !copy.readable;
      counts.hits += copy.first_lane && copy.hot;
    }
    counts.requests += lines.size();
  }
  return counts;
}

template <typename Id>
static Counts emulate_with(const RowTable& table, const HotTable& hot, const void* ids,
                           int64_t num_ids, const int64_t* places, std::byte* out, int format,
                           int element, const float* scales) {
  const GatherTask<Id> task{table,   hot,   row_layout(table, hot), static_cast<const Id*>(ids),
                            num_ids, places};
  if (format < 0) return emulate(task, StoreBytes{out});
  return with_format(static_cast<RowFormat>(format), [&]<typename Rows>(Rows) {
    return with_element(static_cast<Element>(element), [&]<typename Out>(Out) {
      return emulate(task, StoreDecoded<Rows, Out>{out, scales});
    });
  });
}

extern "C" void emulate_gather(std::byte* data, int64_t num_rows, int64_t row_nbytes,
                               int64_t row_stride, const void* ids, int64_t num_ids, int itemsize,
                               std::byte* out, Counts* counts) {
  const RowTable table{data, num_rows, row_nbytes, row_stride};
  const auto run = itemsize == 4 ? emulate_with<int32_t> : emulate_with<int64_t>;
  *counts = run(table, {}, ids, num_ids, nullptr, out, -1, 0, nullptr);
}

// A table of contiguous rows with hot rows, places and a coding.
extern "C" void emulate_stored(std::byte* data, int64_t num_rows, int64_t row_nbytes,
                               const std::byte* hot, int64_t num_hot, const int32_t* slots,
                               const int64_t* ids, int64_t num_ids, const int64_t* places,
                               std::byte* out, int format, int element, const float* scales,
                               Counts* counts) {
  const RowTable table{data, num_rows, row_nbytes, row_nbytes};
  const HotTable hot_table{hot, num_hot, row_nbytes, slots, nullptr};
  *counts =
      emulate_with<int64_t>(table, hot_table, ids, num_ids, places, out, format, element, scales);
}
