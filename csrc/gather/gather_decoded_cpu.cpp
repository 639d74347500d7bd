// The CPU gather of rows that are widened on their way: it reads the small rows, and the wide ones
// are written once, straight to the output.
#include <algorithm>

#include "gather/copy_row.h"
#include "gather/stored_rows.h"
#include "gather/widen_row.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

using DecodeRow = void (*)(std::byte* out, const std::byte* row, int64_t size, float scale);

template <typename Rows, typename Out>
inline __attribute__((always_inline)) void decode_all(std::byte* out, const std::byte* row,
                                                      int64_t size, float scale) {
  auto* __restrict to = reinterpret_cast<typename Out::Value*>(out);
  const auto* __restrict from = reinterpret_cast<const typename Rows::Code*>(row);
  for (int64_t i = 0; i < size; ++i) to[i] = decode<Rows, Out>(from[i], scale);
}

template <typename Rows, typename Out>
void decode_row(std::byte* out, const std::byte* row, int64_t size, float scale) {
  decode_all<Rows, Out>(out, row, size, scale);
}

#if DATAEFF_HAS_WIDE
template <typename Rows, typename Out, bool kStream>
DATAEFF_WIDE void decode_row_wide(std::byte* out, const std::byte* row, int64_t size, float scale) {
  int64_t done = 0;
  if constexpr (std::is_same_v<Out, Float32Element>) {
    done = widen_row<Rows, kStream>(reinterpret_cast<float*>(out),
                                    reinterpret_cast<const typename Rows::Code*>(row), size, scale);
  }
  decode_all<Rows, Out>(out + done * sizeof(typename Out::Value),
                        row + done * sizeof(typename Rows::Code), size - done, scale);
}
#endif

DecodeRow row_decoder(const RowCoding& coding, bool stream) {
  return with_format(coding.format, [&]<typename Rows>(Rows) {
    return with_element(coding.element, [stream]<typename Out>(Out) -> DecodeRow {
#if DATAEFF_HAS_WIDE
      if (wide_vectors())
        return stream ? decode_row_wide<Rows, Out, true> : decode_row_wide<Rows, Out, false>;
#endif
      return decode_row<Rows, Out>;
    });
  });
}

// Whole lines, of an output that leaves the caches before anyone reads it.
bool worth_streaming(const std::byte* out, int64_t out_nbytes, int64_t num_ids) {
  const bool whole_lines = (reinterpret_cast<uintptr_t>(out) | out_nbytes) % kLine == 0;
  return whole_lines && num_ids * out_nbytes >= kStreamNbytes;
}

template <typename Id>
void gather(const RowTable table, const RowCoding coding, const Id* ids, int64_t num_ids,
            std::byte* out, int num_threads) {
  const int64_t size = table.row_nbytes / code_nbytes(coding.format);
  const int64_t out_nbytes = size * element_nbytes(coding.element);
  const DecodeRow decode_one = row_decoder(coding, worth_streaming(out, out_nbytes, num_ids));
  const int64_t ahead = rows_ahead(table.row_nbytes);
  const auto row_of = [=](int64_t i) {
    int64_t row = ids[i];
    return row + ((row >> 63) & table.num_rows);
  };
  const auto fetch = [=](int64_t i) {
    const int64_t row = row_of(i);
    fetch_row(table.data + row * table.row_stride, table.row_nbytes);
    if (coding.scales) fetch_line(coding.scales + row);
  };
  if (num_ids * out_nbytes <= kSerialNbytes) num_threads = 1;
  const int64_t grain = rows_per_piece(out_nbytes, num_ids, num_threads);
  parallel_for(num_ids, grain, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(begin + ahead, end); ++i) fetch(i);
    for (int64_t i = begin; i < end; ++i) {
      if (i + ahead < end) fetch(i + ahead);
      const int64_t row = row_of(i);
      decode_one(out + i * out_nbytes, table.data + row * table.row_stride, size,
                 coding.scales ? coding.scales[row] : 1.0f);
    }
    stream_fence();
  });
}

}  // namespace

int64_t code_nbytes(RowFormat format) {
  return with_format(format,
                     []<typename Rows>(Rows) -> int64_t { return sizeof(typename Rows::Code); });
}

int64_t element_nbytes(Element element) {
  return with_element(element,
                      []<typename Out>(Out) -> int64_t { return sizeof(typename Out::Value); });
}

void gather_decoded_cpu(const RowTable& table, const RowCoding& coding, const RowIndex& index,
                        std::byte* out, int num_threads) {
  check_index(index, table.num_rows, num_threads);
  if (index.size == 0 || table.row_nbytes == 0) return;
  if (index.itemsize == 4) {
    gather(table, coding, static_cast<const int32_t*>(index.data), index.size, out, num_threads);
  } else {
    gather(table, coding, static_cast<const int64_t*>(index.data), index.size, out, num_threads);
  }
}

}  // namespace dataeff
