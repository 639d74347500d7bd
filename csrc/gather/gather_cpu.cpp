#include <algorithm>
#include <cstring>

#include "gather/gather.h"
#include "gather/stream_copy.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int64_t kLine = 64;
// A piece of work: large enough to hide the hand-over, small enough to balance threads.
constexpr int64_t kPieceNbytes = 256 << 10;
// Below this a second thread costs more than it brings.
constexpr int64_t kSerialNbytes = 64 << 10;
// Past this the output leaves the caches before anyone reads it: write around them.
constexpr int64_t kStreamNbytes = 4 << 20;
// Shorter rows were measured to be no faster when streamed.
constexpr int64_t kStreamRowNbytes = 1 << 10;
// Lines under way at once, about what a core can have outstanding, and how many of one row: the
// hardware follows a long row by itself once its first lines have been seen.
constexpr int64_t kAheadLines = 32;
constexpr int64_t kMaxLinesOfRow = 8;

template <typename Id>
std::byte* row_at(const RowTable& table, Id id) {
  int64_t row = id;
  row += (row >> 63) & table.num_rows;
  return table.data + row * table.row_stride;
}

void prefetch(const std::byte* row, int64_t num_lines) {
  for (int64_t line = 0; line < num_lines; ++line) __builtin_prefetch(row + line * kLine, 0, 3);
}

// A short row of a size known to the compiler, which turns the copy into one or two moves; the
// library's memcpy is the faster one from 64 bytes on.
template <int64_t kNbytes>
struct FixedCopy {
  void operator()(std::byte* to, const std::byte* from) const { std::memcpy(to, from, kNbytes); }
};

struct AnyCopy {
  int64_t nbytes;
  void operator()(std::byte* to, const std::byte* from) const { std::memcpy(to, from, nbytes); }
};

struct StreamCopy {
  int64_t nbytes;
  void operator()(std::byte* to, const std::byte* from) const { stream_copy(to, from, nbytes); }
};

template <typename Id, typename Copy>
void gather_with(const RowTable table, const Id* ids, int64_t size, std::byte* out, int num_threads,
                 const Copy copy) {
  const int64_t nbytes = table.row_nbytes;
  const int64_t num_lines = std::min((nbytes - 1) / kLine + 1, kMaxLinesOfRow);
  const int64_t ahead = std::max<int64_t>(kAheadLines / num_lines, 2);
  const int64_t grain = std::max<int64_t>(kPieceNbytes / nbytes, 1);
  if (size * nbytes <= kSerialNbytes) num_threads = 1;
  // Captured by value: a store through std::byte* may alias what a reference leads to, which would
  // then be loaded again after every row.
  parallel_for(size, grain, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(begin + ahead, end); ++i)
      prefetch(row_at(table, ids[i]), num_lines);
    int64_t i = begin;
    for (; i < end - ahead; ++i) {
      prefetch(row_at(table, ids[i + ahead]), num_lines);
      copy(out + i * nbytes, row_at(table, ids[i]));
    }
    for (; i < end; ++i) copy(out + i * nbytes, row_at(table, ids[i]));
    stream_fence();
  });
}

template <typename Id>
void gather(const RowTable& table, const Id* ids, int64_t size, std::byte* out, int num_threads) {
  const auto run = [&](const auto& copy) { gather_with(table, ids, size, out, num_threads, copy); };
  const int64_t nbytes = table.row_nbytes;
  if (nbytes >= kStreamRowNbytes && size * nbytes >= kStreamNbytes && can_stream(out, nbytes))
    return run(StreamCopy{nbytes});
  switch (nbytes) {
    case 1:
      return run(FixedCopy<1>{});
    case 2:
      return run(FixedCopy<2>{});
    case 4:
      return run(FixedCopy<4>{});
    case 8:
      return run(FixedCopy<8>{});
    case 16:
      return run(FixedCopy<16>{});
    case 32:
      return run(FixedCopy<32>{});
    default:
      return run(AnyCopy{nbytes});
  }
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
