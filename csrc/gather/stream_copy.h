// Copies that write around the caches, for output that nobody reads soon: an ordinary store first
// reads the line that it is about to overwrite, which makes three transfers of two.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dataeff {

#if defined(__SSE2__)

// Whether every row of `nbytes` bytes written back to back from `out` starts at a multiple of 16.
inline bool can_stream(const std::byte* out, int64_t nbytes) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(nbytes)) % 16 == 0;
}

// Copies `nbytes`, a multiple of 16, to `to`, which is 16-byte aligned.
inline void stream_copy(std::byte* to, const std::byte* from, int64_t nbytes) {
  const auto* source = reinterpret_cast<const __m128i*>(from);
  auto* target = reinterpret_cast<__m128i*>(to);
  int64_t left = nbytes / 16;
  for (; left >= 4; left -= 4, source += 4, target += 4) {
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  for (; left > 0; --left) _mm_stream_si128(target++, _mm_loadu_si128(source++));
}

// Streamed stores become visible to other threads in order only after this.
inline void stream_fence() { _mm_sfence(); }

#else

inline bool can_stream(const std::byte*, int64_t) { return false; }
inline void stream_copy(std::byte*, const std::byte*, int64_t) {}
inline void stream_fence() {}

#endif

}  // namespace dataeff
