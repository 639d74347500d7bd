// How a gather goes through its rows, and how one is copied while a later one is fetched.
//
// Rows are fetched into the second-level cache: a core keeps several times as many misses under way
// there as into the first (rows of 64 bytes were measured to come 1.7 times as fast).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "gather/wide_vectors.h"

#if DATAEFF_HAS_WIDE
#include <immintrin.h>
#endif

namespace dataeff {

constexpr int64_t kLine = 64;
// A piece of work: large enough to hide the hand-over, small enough to balance threads.
constexpr int64_t kPieceNbytes = 256 << 10;
// Up to here a second thread costs as much as it brings, rows in the caches or not, and where
// another process has its core, a time slice of that (both measured; it gains from twice as much
// on).
constexpr int64_t kSerialNbytes = 128 << 10;
// Past this the output leaves the caches before anyone reads it: write around them. A gather and
// the first reading of what it wrote were measured to take as long either way at 32 MiB.
constexpr int64_t kStreamNbytes = 32 << 20;
// The same where a store writes a line at once: on an Intel Xeon with 2 MiB of second-level cache a
// gather with its first reading was measured to take as long either way at 12 MiB, and 1.08 to 1.25
// times as long through the caches from 16 MiB on.
constexpr int64_t kStreamAtOnceNbytes = 16 << 20;
// Lines under way at once, about what a core can have outstanding.
constexpr int64_t kAheadLines = 64;

// Rows of a piece: what a few hundred rows hold is less than a piece for each thread, so it is
// split evenly.
inline int64_t rows_per_piece(int64_t row_nbytes, int64_t num_rows, int num_threads) {
  const int64_t share = (num_rows - 1) / std::max(num_threads, 1) + 1;
  return std::clamp<int64_t>(kPieceNbytes / row_nbytes, 1, share);
}

// How many rows ahead of the one copied another is fetched.
inline int64_t rows_ahead(int64_t row_nbytes) {
  const int64_t num_lines = (row_nbytes - 1) / kLine + 1;
  return (kAheadLines - 1) / num_lines + 1;
}

// The empty assembly keeps GCC from taking a function that does nothing but fetch for one that does
// nothing at all, whose calls it then leaves out.
template <int kLocality = 1>
inline void fetch_line(const void* at) {
  __builtin_prefetch(at, 0, kLocality);
  __asm__ volatile("");
}

// Every line that a row may touch, wherever in a line it begins.
inline void fetch_row(const std::byte* row, int64_t nbytes) {
  for (int64_t at = 0; at < nbytes; at += kLine) fetch_line(row + at);
  if (nbytes % kLine) fetch_line(row + nbytes - 1);
}

// A short row of a size known to the compiler, which turns the copy into a few moves (rows of 80 to
// 128 bytes were measured to come 1.1 to 1.5 times as fast as line by line).
template <int64_t kNbytes>
struct FixedCopy {
  void operator()(std::byte* to, const std::byte* from, const std::byte* next) const {
    if constexpr (kLine % kNbytes == 0) {
      fetch_line(next);
    } else {
      fetch_row(next, kNbytes);
    }
    std::memcpy(to, from, kNbytes);
  }
};

struct AnyCopy {
  int64_t nbytes;

  void operator()(std::byte* to, const std::byte* from, const std::byte* next) const {
    fetch_row(next, nbytes);
    std::memcpy(to, from, nbytes);
  }
};

// Only the first lines of `next` are fetched, into the first cache: the processor's own prefetcher
// goes on from there, and more requests of ours would stand before those of its stores.
struct HeadCopy {
  static constexpr int64_t kHeadNbytes = 4 * kLine;
  static constexpr int kFirstCache = 3;  // a locality of fetch_line's
  int64_t nbytes;

  void operator()(std::byte* to, const std::byte* from, const std::byte* next) const {
    for (int64_t at = 0; at < std::min(nbytes, kHeadNbytes); at += kLine)
      fetch_line<kFirstCache>(next + at);
    std::memcpy(to, from, nbytes);
  }
};

#if DATAEFF_HAS_WIDE

// AMD's processors were measured to want lines fetched where Intel's are slower for it.
inline bool on_intel() {
  static const bool intel = __builtin_cpu_is("intel");
  return intel;
}

// How a line is copied: written into the caches, or around them. An ordinary store first reads the
// line that it is about to overwrite, which makes three transfers of two.
template <bool kStream>
struct LineInHalves {
  static constexpr bool kStreamed = kStream;
  DATAEFF_WIDE static void copy(std::byte* to, const std::byte* from) {
    auto* target = reinterpret_cast<__m256i*>(to);
    const auto* source = reinterpret_cast<const __m256i*>(from);
    const __m256i low = _mm256_loadu_si256(source), high = _mm256_loadu_si256(source + 1);
    if constexpr (kStream) {
      _mm256_stream_si256(target, low);
      _mm256_stream_si256(target + 1, high);
    } else {
      _mm256_storeu_si256(target, low);
      _mm256_storeu_si256(target + 1, high);
    }
  }
};

using StoredLine = LineInHalves<false>;
using StreamedLine = LineInHalves<true>;

// In one store, which needs no buffer to be completed in. Rows of 256 to 4096 bytes were measured
// to come 1.05 to 1.2 times as fast on an Intel Xeon; AMD's AVX-512 was not measured.
struct LineStreamedAtOnce {
  static constexpr bool kStreamed = true;
  DATAEFF_LINE_WIDE static void copy(std::byte* to, const std::byte* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
};

// Line by line, a line of `next` fetched for each one copied. A part of the caller, whose vectors
// `Line` needs.
template <typename Line>
[[gnu::always_inline]] inline void copy_lines(std::byte* to, const std::byte* from,
                                              const std::byte* next, int64_t nbytes) {
  int64_t left = nbytes;
  if constexpr (Line::kStreamed) {
    const int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine, left);
    if (head) {
      fetch_line(next + nbytes - 1);
      std::memcpy(to, from, head);
      to += head, from += head, left -= head;
    }
  }
  if (left / kLine % 2) {
    fetch_line(next);
    Line::copy(to, from);
    to += kLine, from += kLine, next += kLine, left -= kLine;
  }
  for (; left >= 2 * kLine; left -= 2 * kLine) {
    fetch_line(next);
    fetch_line(next + kLine);
    // The second one first: lines read in order set the hardware's prefetcher on those past the
    // end of the row, which nobody wants (a third of the speed at rows of 512 bytes).
    Line::copy(to + kLine, from + kLine);
    Line::copy(to, from);
    to += 2 * kLine, from += 2 * kLine, next += 2 * kLine;
  }
  if (left) {
    fetch_row(next, left);
    std::memcpy(to, from, left);
  }
}

template <typename Line>
struct LineCopy {
  int64_t nbytes;

  DATAEFF_WIDE void operator()(std::byte* to, const std::byte* from, const std::byte* next) const {
    copy_lines<Line>(to, from, next, nbytes);
  }
};

template <>
struct LineCopy<LineStreamedAtOnce> {
  int64_t nbytes;

  DATAEFF_LINE_WIDE void operator()(std::byte* to, const std::byte* from,
                                    const std::byte* next) const {
    copy_lines<LineStreamedAtOnce>(to, from, next, nbytes);
  }
};

#endif

// Streamed stores become visible to other threads in order only after this.
inline void stream_fence() {
#if DATAEFF_HAS_WIDE
  _mm_sfence();
#endif
}

}  // namespace dataeff
