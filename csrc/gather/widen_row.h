// Rows widened to float32 by AVX2 and by the processor's own conversion from float16 (F16C),
// sixteen elements at a time. The bits are those of decode() in row_format.h, whatever the rounding
// and denormal modes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gather/row_format.h"
#include "gather/wide_vectors.h"

#if DATAEFF_HAS_WIDE
#include <immintrin.h>

namespace dataeff {

struct Sixteen {
  __m256 low, high;
};

DATAEFF_WIDE inline Sixteen widen_sixteen(Float16Rows, const uint16_t* from, __m256) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

DATAEFF_WIDE inline __m256 widen_bfloats(const uint16_t* from) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
}

DATAEFF_WIDE inline Sixteen widen_sixteen(BFloat16Rows, const uint16_t* from, __m256) {
  return {widen_bfloats(from), widen_bfloats(from + 8)};
}

DATAEFF_WIDE inline __m256 widen_int8s(const uint8_t* from, __m256 scale) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale);
}

DATAEFF_WIDE inline Sixteen widen_sixteen(Int8Rows, const uint8_t* from, __m256 scale) {
  return {widen_int8s(from, scale), widen_int8s(from + 8, scale)};
}

// A float8 whose exponent and mantissa are moved to those of a float16 is the same number times
// 2^-8, denormals included, since the biases are 7 and 15. Only NaN needs a hand.
DATAEFF_WIDE inline Sixteen widen_sixteen(Float8Rows, const uint8_t* from, __m256 scale_256) {
  const __m256i size_bits = _mm256_set1_epi16(0x3f80), sign_bit = _mm256_set1_epi16(-0x8000);
  const __m256i codes =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(codes, 7), size_bits);
  const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, size_bits);
  const __m256i sized = _mm256_blendv_epi8(magnitude, _mm256_set1_epi16(0x7e00), is_nan);
  const __m256i halves =
      _mm256_or_si256(sized, _mm256_and_si256(_mm256_slli_epi16(codes, 8), sign_bit));
  const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  return {_mm256_mul_ps(_mm256_cvtph_ps(low), scale_256),
          _mm256_mul_ps(_mm256_cvtph_ps(high), scale_256)};
}

// What sixteen elements are multiplied by. 256 times a larger scale is no float32: such a row, of
// values near the largest there are, is left to decode().
constexpr float kLargestWideScale = 0x1p119f;

// Widens the first elements of a row and returns how many: a multiple of sixteen. With `kStream`
// the stores go around the caches, and `to` must begin at a multiple of 32 bytes.
template <typename Rows, bool kStream>
DATAEFF_WIDE inline int64_t widen_row(float* to, const typename Rows::Code* from, int64_t size,
                                      float scale) {
  constexpr bool kIsFloat8 = std::is_same_v<Rows, Float8Rows>;
  if (kIsFloat8 && scale > kLargestWideScale) return 0;
  const __m256 scales = _mm256_set1_ps(kIsFloat8 ? scale * 256.0f : scale);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const Sixteen values = widen_sixteen(Rows{}, from + i, scales);
    if constexpr (kStream) {
      _mm256_stream_ps(to + i, values.low);
      _mm256_stream_ps(to + i + 8, values.high);
    } else {
      _mm256_storeu_ps(to + i, values.low);
      _mm256_storeu_ps(to + i + 8, values.high);
    }
  }
  return i;
}

}  // namespace dataeff
#endif
