// Rows made smaller: one pass for the largest magnitude of a row, one for its codes.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "gather/stored_rows.h"
#include "gather/wide_vectors.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int64_t kPieceNbytes = 256 << 10;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kSmallestScale = 0x1p-126f;

// The largest magnitude as the bits of a float, which order as magnitudes do; from kInfinity on
// the row is not finite.
template <typename In>
inline __attribute__((always_inline)) uint32_t largest_of(const typename In::Value* row,
                                                          int64_t size) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = bits_as<uint32_t>(In::widen(row[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Returns the row's scale, or 0 when the row is not finite.
template <typename In, typename Rows>
inline __attribute__((always_inline)) float encode(const std::byte* row, int64_t size,
                                                   std::byte* codes) {
  const auto* __restrict from = reinterpret_cast<const typename In::Value*>(row);
  auto* __restrict to = reinterpret_cast<typename Rows::Code*>(codes);
  const uint32_t largest = largest_of<In>(from, size);
  if (largest >= kInfinity) return 0.0f;
  // Never so large, by a rounding up, that the largest code times it is infinite.
  constexpr float kLargestScale = 0x1.fffffcp127f / Rows::kLargest;
  const float scale =
      std::clamp(bits_as<float>(largest) / Rows::kLargest, kSmallestScale, kLargestScale);
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < size; ++i) to[i] = Rows::narrow(In::widen(from[i]) * inverse);
  return scale;
}

using EncodeRow = float (*)(const std::byte* row, int64_t size, std::byte* codes);

template <typename In, typename Rows>
float encode_row(const std::byte* row, int64_t size, std::byte* codes) {
  return encode<In, Rows>(row, size, codes);
}

template <typename In, typename Rows>
DATAEFF_WIDE float encode_row_wide(const std::byte* row, int64_t size, std::byte* codes) {
  return encode<In, Rows>(row, size, codes);
}

EncodeRow row_encoder(Element element, RowFormat format) {
  return with_element(element, [&]<typename In>(In) -> EncodeRow {
    if (format == RowFormat::kInt8)
      return wide_vectors() ? encode_row_wide<In, Int8Rows> : encode_row<In, Int8Rows>;
    return wide_vectors() ? encode_row_wide<In, Float8Rows> : encode_row<In, Float8Rows>;
  });
}

}  // namespace

void encode_rows(const RowTable& source, Element element, RowFormat format, std::byte* codes,
                 float* scales, int num_threads) {
  const EncodeRow encode_one = row_encoder(element, format);
  const int64_t size = source.row_nbytes / element_nbytes(element);
  const int64_t grain =
      std::max<int64_t>(kPieceNbytes / std::max<int64_t>(source.row_nbytes, 1), 1);
  std::atomic<int64_t> first_bad{source.num_rows};
  parallel_for(source.num_rows, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scales[row] = encode_one(source.data + row * source.row_stride, size, codes + row * size);
      if (scales[row] > 0.0f) continue;
      int64_t seen = first_bad.load();
      while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  if (first_bad < source.num_rows)
    throw std::invalid_argument("row " + std::to_string(first_bad) +
                                " holds a NaN, an infinity or a value that is one as float32, "
                                "which rows with a scale cannot carry: clean it, or keep the rows "
                                "as \"fp16\" or \"bf16\"");
}

}  // namespace dataeff
