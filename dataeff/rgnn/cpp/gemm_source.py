"""The C++ typed GEMM: gathered rows, register tiles, one loop over all types.

The text is compiled once per value and index type for the CPU at hand (`toolchain.compile_cpp`).
Each piece of the loop is a tile of rows of one type; a tile's rows are read through `gather` by the
multiply-adds themselves, so no gathered copy is made, and fetched ahead: 3.8 million rows of 64
features out of 1.7 million take 0.29 s then instead of 0.43 on two Zen 4 cores. Weights that are
not contiguous are packed once for all tiles of their type that follow one another.

Products that are added up where `target` says are never stored: each thread has a range of the
sums, and takes of every type the rows that lead there, so that each sum adds its rows up in order.
The weight gradient, and sums by type, are in `gemm_sums_source`.
"""

from __future__ import annotations

import ctypes

from dataeff.rgnn.cpp.gemm_sums_source import GRADIENT, SUM
from dataeff.rgnn.cpp.parallel import PARALLEL_HEADER

CPP_VALUES = {"float32": "float", "float64": "double"}
CPP_INDICES = {"int32": "int32_t", "int64": "int64_t"}

_POINTERS = ("x", "weight", "y", "seg_ptr", "gather", "row_scale", "extra", "bad", "target")
_SIZES = (
    *("num_rows", "num_source", "num_types", "num_heads", "num_in", "num_out"),
    *("x_row", "x_head", "w_type", "w_head", "w_in", "w_out", "y_row", "y_head"),
    *("s_row", "s_head", "chunk", "num_threads", "num_sums", "add"),
)


class Arguments(ctypes.Structure):
    """Addresses (0 for what is absent), sizes and strides in elements, as the C++ struct."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_POINTERS, *_SIZES)]


_ARGUMENTS = "\n".join(
    [
        "struct Arguments {",
        "  const Value *x, *weight;  // the weight gradient reads dy through weight",
        "  Value* y;                 // and writes dW to y",
        "  const int64_t* seg_ptr;",
        "  const Index* gather;",
        "  const Value* row_scale;",
        "  Value* extra;",
        "  int64_t* bad;",
        "  const Index* target;      // the row of y that a row is added to; null: its own",
        *(f"  int64_t {name};" for name in _SIZES),
        "};",
    ]
)

_TILES = """
// Rows of the forward tile and inputs of the weight gradient's: with fewer sums than it takes to
// hide a multiply-add behind others, each of them is waited for.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 6, kInputs = 4, kVectors = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 6, kInputs = 6, kVectors = 2;
#else
constexpr int kVectorBytes = 16, kRows = 4, kInputs = 4, kVectors = 2;
#endif
constexpr int64_t kTileRows = 192;  // of one piece of the forward loop
constexpr int64_t kFirstCache = (24 << 10) / sizeof(Value);  // elements of a weight in it
constexpr int64_t kBlockRows = 96;  // that the weight gradient multiplies from the first cache
constexpr int64_t kLine = 64 / sizeof(Value);
// A panel of a weight this wide has a page for every two of its rows: it is packed, unless few rows
// are multiplied with it.
constexpr int64_t kWideWeight = 2048 / sizeof(Value);

typedef Value Vector __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / sizeof(Value);
constexpr int kPanel = kLanes * kVectors;

// Memory that starts with a line: a vector that two of them share takes two loads.
struct alignas(64) Line {
  Value values[kLine];
};
struct Lines {
  std::vector<Line> lines;
  void resize(int64_t size) { lines.resize((size + kLine - 1) / kLine); }
  Value* data() { return reinterpret_cast<Value*>(lines.data()); }
};

static inline Vector load(const Value* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
static inline void store(Value* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Runs call(std::integral_constant<int, n>) for a count known only at run time, 1 <= n <= Max.
template <int Max, class Call>
static inline void with_constant(int n, const Call& call) {
  if constexpr (Max > 1) {
    if (n < Max) return with_constant<Max - 1>(n, call);
  }
  call(std::integral_constant<int, Max>{});
}

// Which tile of which type: tile_ptr is the exclusive prefix sum of the tiles of each type.
static std::vector<int64_t> count_tiles(const Arguments& a, int64_t block) {
  std::vector<int64_t> tile_ptr(a.num_types + 1, 0);
  for (int64_t t = 0; t < a.num_types; ++t)
    tile_ptr[t + 1] = tile_ptr[t] + (a.seg_ptr[t + 1] - a.seg_ptr[t] + block - 1) / block;
  return tile_ptr;
}

// Calls each(type, first row, end row, number of the tile within its type).
template <class Each>
static void for_tiles(const Arguments& a, const std::vector<int64_t>& tile_ptr, int64_t block,
                      int64_t grain, const Each& each) {
  dataeff::parallel_for(tile_ptr.back(), grain, a.num_threads, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(tile_ptr.begin(), tile_ptr.end(), begin) - tile_ptr.begin() - 1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile_ptr[t + 1] <= tile) ++t;
      const int64_t part = tile - tile_ptr[t], row = a.seg_ptr[t] + part * block;
      each(t, row, std::min(row + block, a.seg_ptr[t + 1]), part);
    }
  });
}

// Rows that an index leads to are fetched before they are read: no processor guesses them. Rows of
// results are fetched to be written, as a store of what no cache holds waits for memory.
template <bool Write = false>
static inline void fetch(const Value* row, int64_t size) {
  for (int64_t k = 0; k < size; k += kLine) __builtin_prefetch(row + k, Write);
}

// The row of x that row i reads; a wrong index is reported and reads row 0.
static inline const Value* source_row(const Arguments& a, int64_t i) {
  if (!a.gather) return a.x + i * a.x_row;
  const int64_t at = a.gather[i];
  if (at < 0 || at >= a.num_source) {
    __atomic_store_n(a.bad, i, __ATOMIC_RELAXED);
    return a.x;
  }
  return a.x + at * a.x_row;
}
"""

_FORWARD = """
// Rows x V columns: y[r] = scale[r] * (x[r] @ b), or y[r] += that, b with ld elements between its
// rows; scale may be null.
template <bool Add, int Rows, int V>
static void multiply(const Value* const* x, int64_t num_in, const Value* b, int64_t ld,
                     const Value* scale, Value* const* y, int64_t column, int64_t num_columns) {
  Vector acc[Rows][V] = {};
  const Value* row[Rows];
  for (int r = 0; r < Rows; ++r) row[r] = x[r];
  for (int64_t k = 0; k < num_in; ++k, b += ld) {
    Vector bk[V];
    for (int v = 0; v < V; ++v) bk[v] = load(b + v * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] += row[r][k] * bk[v];
  }
  if (scale)
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] *= scale[r];
  for (int r = 0; r < Rows; ++r) {
    Value* const to = y[r] + column;
    if (num_columns == V * kLanes) {
      for (int v = 0; v < V; ++v)
        store(to + v * kLanes, Add ? load(to + v * kLanes) + acc[r][v] : acc[r][v]);
    } else {
      Value found[V * kLanes];
      for (int v = 0; v < V; ++v) store(found + v * kLanes, acc[r][v]);
      for (int64_t n = 0; n < num_columns; ++n) to[n] = Add ? to[n] + found[n] : found[n];
    }
  }
}

// All columns of a weight, kPanel after kPanel, with zeros beyond the last.
static void pack(const Arguments& a, const Value* w, Lines& panels) {
  panels.resize(a.num_in * ((a.num_out + kPanel - 1) / kPanel * kPanel));
  Value* to = panels.data();
  for (int64_t column = 0; column < a.num_out; column += kPanel) {
    const int64_t filled = std::min<int64_t>(kPanel, a.num_out - column);
    // A few rows at a time: of a transposed weight, a line holds so many elements of one column.
    for (int64_t first = 0; first < a.num_in; first += kLine) {
      const int64_t rows = std::min(kLine, a.num_in - first);
      const Value* const from = w + first * a.w_in + column * a.w_out;
      for (int64_t n = 0; n < kPanel; ++n)
        for (int64_t k = 0; k < rows; ++k)
          to[k * kPanel + n] = n < filled ? from[k * a.w_in + n * a.w_out] : Value(0);
      to += rows * kPanel;
    }
  }
}

// What one thread keeps between tiles: a packed weight, and the rows of a product that overwrites
// them, [kTileRows, num_in].
struct Workspace {
  Lines panels;
  std::vector<Value> rows;
  const Value* packed = nullptr;  // where the panels were read from, in the call number `call`
  int64_t call = 0;
};

// At most kTileRows rows; no two that are added up have one target.
template <bool Add>
static void multiply_tile(const Arguments& a, int64_t t, int64_t head, int64_t begin,
                          int64_t end, Workspace& work) {
  const Value* x[kTileRows];
  Value* y[kTileRows];
  Value scale[kTileRows];
  const int64_t num_rows = end - begin;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (a.x == a.y) {
      Value* const copy = work.rows.data() + i * a.num_in;
      std::copy_n(a.x + (begin + i) * a.x_row + head * a.x_head, a.num_in, copy);
      x[i] = copy;
    } else {
      x[i] = source_row(a, begin + i) + head * a.x_head;
    }
    const int64_t to = Add ? int64_t(a.target[begin + i]) : begin + i;
    y[i] = a.y + to * a.y_row + head * a.y_head;
    if (a.row_scale) scale[i] = a.row_scale[(begin + i) * a.s_row + head * a.s_head];
  }
  const Value* const w = a.weight + t * a.w_type + head * a.w_head;
  const bool in_place = a.w_out == 1 && a.num_out % kLanes == 0 &&
                        (a.num_out < kWideWeight || num_rows < kTileRows / 2);
  if (!in_place && work.packed != w) {
    pack(a, w, work.panels);
    work.packed = w;
  }
  // A weight that the first cache holds is read through for every few rows, which are then read
  // once; else a panel of it is read for all rows of the tile.
  const int64_t group = a.num_in * a.num_out <= kFirstCache ? kRows : num_rows;
  for (int64_t first = 0; first < num_rows; first += group) {
    const int64_t last = std::min(first + group, num_rows);
    for (int64_t column = 0; column < a.num_out; column += kPanel) {
      const int64_t columns = std::min<int64_t>(kPanel, a.num_out - column);
      const Value* const b = in_place ? w + column : work.panels.data() + column * a.num_in;
      const int64_t ld = in_place ? a.w_in : kPanel;
      for (int64_t i = first; i < last; i += kRows) {
        for (int64_t n = i + kRows; n < std::min<int64_t>(i + 2 * kRows, num_rows); ++n) {
          if (a.gather && !column) fetch(x[n], a.num_in);
          fetch<true>(y[n] + column, columns);
        }
        const int rows = static_cast<int>(std::min<int64_t>(kRows, num_rows - i));
        with_constant<kVectors>(static_cast<int>((columns + kLanes - 1) / kLanes), [&](auto v) {
          with_constant<kRows>(rows, [&](auto r) {
            multiply<Add, decltype(r)::value, decltype(v)::value>(
                x + i, a.num_in, b, ld, a.row_scale ? scale + i : nullptr, y + i, column, columns);
          });
        });
      }
    }
  }
}

// Starts of the ranges of sums that threads work on, about as many rows in each. A range walks all
// types, and packs their weights anew, which takes as long as some 30 rows: there are few where
// types have few rows, or wide ones, whose sums need not wait in a cache for the next type.
static std::vector<int64_t> ranges_of_sums(const Arguments& a) {
  constexpr int64_t kSamples = 4096, kMostPerThread = 16;
  const int64_t per_type = a.num_rows / std::max<int64_t>(a.num_types * a.num_threads, 1);
  const int64_t least = std::max(kTileRows, 2 * a.num_in);
  const int64_t ranges =
      a.num_threads * std::min(std::max<int64_t>(per_type / least, 1), kMostPerThread);
  std::vector<int64_t> sample(std::min(a.num_rows, kSamples)), bounds{0};
  const int64_t size = sample.size();
  for (int64_t k = 0; k < size; ++k) sample[k] = a.target[k * a.num_rows / size];
  std::sort(sample.begin(), sample.end());
  for (int64_t range = 1; range < ranges && size; ++range)
    bounds.push_back(sample[range * size / ranges]);
  bounds.push_back(a.num_sums);
  return bounds;
}

// y[target[i]] += x[i] @ weight[type of i], from zero or, with `add`, from what is there. In a type
// targets ascend, none comes twice, and y is contiguous.
EXPORT void typed_gemm_sum(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const std::vector<int64_t> bounds = ranges_of_sums(a);
  dataeff::parallel_for(bounds.size() - 1, 1, a.num_threads, [&](int64_t begin, int64_t end) {
    Workspace work;
    for (int64_t range = begin; range < end; ++range) {
      const int64_t low = bounds[range], high = bounds[range + 1];
      if (!a.add) std::fill(a.y + low * a.y_row, a.y + high * a.y_row, Value(0));
      for (int64_t t = 0; t < a.num_types; ++t) {
        const Index* const stop = a.target + a.seg_ptr[t + 1];
        const Index* const from = std::lower_bound(a.target + a.seg_ptr[t], stop, low);
        const int64_t first = from - a.target;
        const int64_t last = std::lower_bound(from, stop, high) - a.target;
        for (int64_t head = 0; head < a.num_heads; ++head)
          for (int64_t row = first; row < last; row += kTileRows)
            multiply_tile<true>(a, t, head, row, std::min(row + kTileRows, last), work);
      }
    }
  });
}

EXPORT void typed_gemm(const Arguments* arguments) {
  static std::atomic<int64_t> calls{0};
  const int64_t call = ++calls;
  const Arguments& a = *arguments;
  const std::vector<int64_t> tile_ptr = count_tiles(a, kTileRows);
  const int64_t grain = std::max<int64_t>(1, tile_ptr.back() / (a.num_threads * 16));
  for_tiles(a, tile_ptr, kTileRows, grain, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
    static thread_local Workspace work;
    if (work.call != call) work.packed = nullptr;
    work.call = call;
    if (a.x == a.y) work.rows.resize(kTileRows * a.num_in);
    for (int64_t head = 0; head < a.num_heads; ++head)
      multiply_tile<false>(a, t, head, begin, end, work);
  });
}
"""


def source(value: str, index: str) -> str:
    """The translation unit for torch's dtype names, such as `float32` and `int32`."""
    return "\n".join(
        [
            f"// Typed GEMM and its weight gradient: {value} values, {index} indices.",
            "#include <algorithm>\n#include <atomic>\n#include <cstring>\n"
            "#include <type_traits>\n#include <vector>",
            PARALLEL_HEADER,
            f"using Value = {CPP_VALUES[value]};\nusing Index = {CPP_INDICES[index]};",
            '#define EXPORT extern "C" __attribute__((visibility("default")))\n',
            _ARGUMENTS,
            _TILES,
            _FORWARD,
            GRADIENT,
            SUM,
        ]
    )
