// Rows widened by the processor's own conversion from float16 (F16C), eight elements at a time. The
// bits are those of decode() in row_format.h, whatever the rounding and denormal modes.
#pragma once

#include <cstdint>

#include "gather/wide_vectors.h"

#if DATAEFF_HAS_WIDE
#include <immintrin.h>

namespace dataeff {

// Both return how many elements they did, a multiple of eight.
DATAEFF_WIDE inline int64_t widen_halves(float* to, const uint16_t* from, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

// A float8 whose exponent and mantissa are moved to those of a float16 is the same number times
// 2^-8, denormals included, since the biases are 7 and 15. Only NaN needs a hand.
DATAEFF_WIDE inline int64_t widen_float8s(float* to, const uint8_t* from, int64_t size,
                                          float scale) {
  const __m128i size_bits = _mm_set1_epi16(0x3f80), sign_bit = _mm_set1_epi16(-0x8000);
  const __m128i quiet_nan = _mm_set1_epi16(0x7e00);
  const __m256 bias = _mm256_set1_ps(256.0f), scales = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i codes =
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
    const __m128i magnitude = _mm_and_si128(_mm_slli_epi16(codes, 7), size_bits);
    const __m128i is_nan = _mm_cmpeq_epi16(magnitude, size_bits);
    const __m128i halves = _mm_or_si128(_mm_blendv_epi8(magnitude, quiet_nan, is_nan),
                                        _mm_and_si128(_mm_slli_epi16(codes, 8), sign_bit));
    // Twice, not by one product of both: the first is exact, and the second cannot overflow early.
    const __m256 values = _mm256_mul_ps(_mm256_cvtph_ps(halves), bias);
    _mm256_storeu_ps(to + i, _mm256_mul_ps(values, scales));
  }
  return i;
}

}  // namespace dataeff
#endif
