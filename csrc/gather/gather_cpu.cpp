#include <algorithm>
#include <cstring>
#include <utility>

#include "gather/copy_row.h"
#include "gather/gather.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

// Rows that are not whole lines share some with their neighbours, which are not streamed: shorter
// ones were measured to be slower for it.
constexpr int64_t kStreamRowNbytes = 512;

#if DATAEFF_HAS_WIDE
// An Intel Xeon was measured to copy rows shorter than this, and rows that are not whole lines,
// 1.1 to 1.25 times as fast when only their first lines are fetched; an AMD EPYC wants every line.
constexpr int64_t kHeadRowNbytes = 1024;

bool heads_suffice(int64_t row_nbytes) {
  return on_intel() && (row_nbytes < kHeadRowNbytes || row_nbytes % kLine);
}
#endif

template <typename Id>
std::byte* row_at(const RowTable& table, Id id) {
  int64_t row = id;
  row += (row >> 63) & table.num_rows;
  return table.data + row * table.row_stride;
}

// Rows [begin, end) of the output.
template <typename Id, typename Copy>
void copy_rows(const RowTable table, const Id* ids, int64_t begin, int64_t end, std::byte* out,
               int64_t ahead, const Copy copy) {
  const int64_t nbytes = table.row_nbytes;
  for (int64_t i = begin; i < end; ++i) {
    const std::byte* next = row_at(table, ids[std::min(i + ahead, end - 1)]);
    copy(out + i * nbytes, row_at(table, ids[i]), next);
  }
}

#if DATAEFF_HAS_WIDE

// What is fetched of a later row. Nothing of a table that a core's second-level cache holds, which
// is 1.1 to 1.3 times as fast; of rows longer than two lines their heads, as by HeadCopy: asking
// for every line cost a third of the speed where rows of 512 bytes were in the caches (both
// measured).
enum class Fetch { kNothing, kHead, kLines };
constexpr int64_t kCachedNbytes = 3 << 19;

// A line of a row in one move, and the end of a row that is not whole lines once more. The loop
// stands here because a copy that needs vectors is called by a loop that does not, not made a part
// of it: rows of 64 bytes were measured to come 1.5 times as fast.
template <Fetch kFetch>
struct LinesAtOnce {};

template <typename Id, Fetch kFetch>
DATAEFF_LINE_WIDE void copy_rows(const RowTable given, const Id* ids, int64_t begin, int64_t end,
                                 std::byte* out, int64_t ahead, LinesAtOnce<kFetch>) {
  // Not the argument, which is in memory that a store may alias.
  const RowTable table = given;
  const int64_t nbytes = table.row_nbytes;
  const int64_t whole_nbytes = nbytes / kLine * kLine;
  const int64_t head_nbytes = std::min(nbytes, HeadCopy::kHeadNbytes);
  for (int64_t i = begin; i < end; ++i) {
    const std::byte* next = row_at(table, ids[std::min(i + ahead, end - 1)]);
    const std::byte* from = row_at(table, ids[i]);
    std::byte* to = out + i * nbytes;
    if constexpr (kFetch == Fetch::kHead) {
      for (int64_t at = 0; at < head_nbytes; at += kLine)
        fetch_line<HeadCopy::kFirstCache>(next + at);
    }
    for (int64_t at = 0; at < whole_nbytes; at += kLine) {
      if constexpr (kFetch == Fetch::kLines) fetch_line(next + at);
      _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
    }
    if (whole_nbytes < nbytes) {
      if constexpr (kFetch == Fetch::kLines) fetch_line(next + nbytes - 1);
      _mm512_storeu_si512(to + nbytes - kLine, _mm512_loadu_si512(from + nbytes - kLine));
    }
  }
}

#endif

template <typename Id, typename Copy>
void gather_with(const RowTable table, const Id* ids, int64_t size, std::byte* out, int num_threads,
                 const Copy copy) {
  const int64_t nbytes = table.row_nbytes;
  const int64_t ahead = rows_ahead(nbytes);
  if (size * nbytes <= kSerialNbytes) num_threads = 1;
  const int64_t grain = rows_per_piece(nbytes, size, num_threads);
  // Captured by value: a store through std::byte* may alias what a reference leads to, which would
  // then be loaded again after every row.
  parallel_for(size, grain, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(begin + ahead, end); ++i)
      fetch_row(row_at(table, ids[i]), nbytes);
    copy_rows(table, ids, begin, end, out, ahead, copy);
    stream_fence();
  });
}

bool worth_streaming(const std::byte* out, int64_t nbytes, int64_t size, int64_t from_nbytes) {
  const bool whole_lines = (reinterpret_cast<uintptr_t>(out) | nbytes) % kLine == 0;
  return size * nbytes >= from_nbytes && (whole_lines || nbytes >= kStreamRowNbytes);
}

// Past two lines a loop over them is as fast, and faster where the table is in no cache.
using FixedSizes = std::integer_sequence<int64_t, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128>;

template <int64_t... kNbytes>
bool run_fixed(int64_t nbytes, const auto& run, std::integer_sequence<int64_t, kNbytes...>) {
  return ((nbytes == kNbytes && (run(FixedCopy<kNbytes>{}), true)) || ...);
}

template <typename Id>
void gather(const RowTable& table, const Id* ids, int64_t size, std::byte* out, int num_threads) {
  const auto run = [&](const auto& copy) { gather_with(table, ids, size, out, num_threads, copy); };
  const int64_t nbytes = table.row_nbytes;
#if DATAEFF_HAS_WIDE
  const bool wide = nbytes >= kLine && wide_vectors();
  if (wide && line_wide_vectors() && worth_streaming(out, nbytes, size, kStreamAtOnceNbytes))
    return run(LineCopy<LineStreamedAtOnce>{nbytes});
  if (wide && worth_streaming(out, nbytes, size, kStreamNbytes))
    return run(LineCopy<StreamedLine>{nbytes});
  const bool in_lines = nbytes >= kLine && on_intel() && line_wide_vectors();
  const auto run_lines = [&] {
    if (table.num_rows * nbytes <= kCachedNbytes) return run(LinesAtOnce<Fetch::kNothing>{});
    if (nbytes > 2 * kLine) return run(LinesAtOnce<Fetch::kHead>{});
    return run(LinesAtOnce<Fetch::kLines>{});
  };
  if (in_lines && nbytes % kLine == 0) return run_lines();
#endif
  if (run_fixed(nbytes, run, FixedSizes{})) return;
#if DATAEFF_HAS_WIDE
  if (in_lines) return run_lines();
  if (wide && heads_suffice(nbytes)) return run(HeadCopy{nbytes});
  if (wide) return run(LineCopy<StoredLine>{nbytes});
#endif
  run(AnyCopy{nbytes});
}

// Thread t owns the rows of one stretch of the table and walks the whole index in order, so the
// last row written for an index is the last one named, and no two threads write one row.
template <typename Id>
void scatter(const RowTable& table, const Id* ids, int64_t size, const std::byte* rows,
             int num_threads) {
  const int64_t nbytes = table.row_nbytes;
  const int64_t num_parts =
      size * nbytes <= kSerialNbytes ? 1 : std::min<int64_t>(num_threads, table.num_rows);
  parallel_for(num_parts, 1, num_threads, [&](int64_t part, int64_t) {
    const int64_t begin = table.num_rows * part / num_parts;
    const int64_t end = table.num_rows * (part + 1) / num_parts;
    for (int64_t i = 0; i < size; ++i) {
      int64_t row = ids[i];
      row += (row >> 63) & table.num_rows;
      if (row >= begin && row < end)
        std::memcpy(table.data + row * table.row_stride, rows + i * nbytes, nbytes);
    }
  });
}

}  // namespace

void gather_cpu(const RowTable& table, const RowIndex& index, std::byte* out, int num_threads) {
  check_index(index, table.num_rows, num_threads);
  if (index.size == 0 || table.row_nbytes == 0) return;
  if (index.itemsize == 4) {
    gather(table, static_cast<const int32_t*>(index.data), index.size, out, num_threads);
  } else {
    gather(table, static_cast<const int64_t*>(index.data), index.size, out, num_threads);
  }
}

void scatter_cpu(const RowTable& table, const RowIndex& index, const std::byte* rows,
                 int num_threads) {
  check_index(index, table.num_rows, num_threads);
  if (index.size == 0 || table.row_nbytes == 0) return;
  if (index.itemsize == 4) {
    scatter(table, static_cast<const int32_t*>(index.data), index.size, rows, num_threads);
  } else {
    scatter(table, static_cast<const int64_t*>(index.data), index.size, rows, num_threads);
  }
}

}  // namespace dataeff
