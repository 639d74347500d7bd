"""The C++ of sums over the rows of each type: the weight gradient, and sums by type.

A type's rows are split into chunks whose size depends on the row count alone, and the chunks are
added up in order: the bits do not depend on the number of threads. The text stands behind that of
`gemm_source`, whose tiles and arguments it uses.
"""

from __future__ import annotations

GRADIENT = """
// sum += the outer products of `rows` rows: `One` elements of one side from `first`, times `V`
// vectors of the other from `column`. Outputs are read in vectors, with Swapped inputs.
template <bool Swapped, int One, int V>
static void add_outer(const Value* const* x, const Value* dy, int64_t ld, int64_t first,
                      int64_t column, int64_t rows, Value* sum, int64_t sum_ld) {
  Vector acc[One][V] = {};
  for (int64_t r = 0; r < rows; ++r, dy += ld) {
    const Value* const one = (Swapped ? dy : x[r]) + first;
    const Value* const many = (Swapped ? x[r] : dy) + column;
    Vector d[V];
    for (int v = 0; v < V; ++v) d[v] = load(many + v * kLanes);
    for (int i = 0; i < One; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] += one[i] * d[v];
  }
  for (int i = 0; i < One; ++i)
    for (int v = 0; v < V; ++v) {
      Value* to = sum + i * sum_ld + v * kLanes;
      store(to, load(to) + acc[i][v]);
    }
}

// Which side is read in vectors: outputs, with zeros beyond the last; inputs where outputs do not
// fill one and inputs do. `one` and `many` count the elements of either side.
struct Sides {
  explicit Sides(const Arguments& a)
      : swapped(a.num_out < kLanes && a.num_in % kLanes == 0),
        padded(swapped ? a.num_out : (a.num_out + kLanes - 1) / kLanes * kLanes),
        one(swapped ? a.num_out : a.num_in),
        many(swapped ? a.num_in : padded) {}
  bool swapped;
  int64_t padded, one, many;
};

// Rows this wide, of a power of two, fall on a few sets of the first cache, which then holds no
// block of them: a block is copied to rows of an odd number of lines.
constexpr int64_t kWide = 1024 / sizeof(Value);
static inline int64_t apart(int64_t size) {
  return ((size + kLine - 1) / kLine | 1) * kLine;
}

struct Scratch {
  std::vector<Value> sum;  // [one, many], unless the result has this layout
  Lines dy;                // [kBlockRows, apart(padded)], scaled, zeros beyond num_out
  Lines x;                 // [kBlockRows, apart(num_in)]
};

// Meanwhile the rows of the next block, which are those before `end`, are fetched.
template <bool Swapped>
static void add_block(const Arguments& a, int64_t head, int64_t begin, int64_t rows,
                      const Sides& sides, int64_t end, Value* const sums, Scratch& scratch) {
  const Value* x[kBlockRows];
  for (int64_t r = 0; r < rows; ++r) {
    x[r] = source_row(a, begin + r) + head * a.x_head;
    if (a.num_in < kWide) continue;
    Value* const copy = scratch.x.data() + r * apart(a.num_in);
    x[r] = std::copy_n(x[r], a.num_in, copy) - a.num_in;
  }
  const Value* dy = a.weight + begin * a.w_in + head * a.w_head;
  int64_t ld = a.w_in;
  if (a.row_scale || sides.padded != a.num_out || a.num_out >= kWide) {
    ld = apart(sides.padded);
    for (int64_t r = 0; r < rows; ++r) {
      const Value scale =
          a.row_scale ? a.row_scale[(begin + r) * a.s_row + head * a.s_head] : Value(1);
      Value* const copy = scratch.dy.data() + r * ld;
      for (int64_t n = 0; n < a.num_out; ++n) copy[n] = scale * dy[r * a.w_in + n];
    }
    dy = scratch.dy.data();
  }
  int64_t next = begin + rows;
  const int64_t next_end = std::min(next + kBlockRows, end);
  const int64_t each = (kBlockRows * kInputs + sides.one - 1) / std::max<int64_t>(sides.one, 1);
  for (int64_t column = 0; column < sides.many; column += kPanel) {
    const int vectors = static_cast<int>(std::min<int64_t>(kPanel, sides.many - column) / kLanes);
    for (int64_t first = 0; first < sides.one; first += kInputs) {
      for (int64_t n = 0; a.gather && n < each && next < next_end; ++n, ++next)
        fetch(source_row(a, next) + head * a.x_head, a.num_in);
      const int ones = static_cast<int>(std::min<int64_t>(kInputs, sides.one - first));
      Value* const sum = sums + first * sides.many + column;
      with_constant<kVectors>(vectors, [&](auto v) {
        with_constant<kInputs>(ones, [&](auto i) {
          add_outer<Swapped, decltype(i)::value, decltype(v)::value>(x, dy, ld, first, column,
                                                                     rows, sum, sides.many);
        });
      });
    }
  }
}

EXPORT void typed_gemm_dw(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Sides sides(a);
  const int64_t size = a.num_heads * a.num_in * a.num_out;
  const std::vector<int64_t> tile_ptr = count_tiles(a, a.chunk);
  std::vector<int64_t> extra_ptr(a.num_types + 1, 0);  // slots of the chunks after the first
  for (int64_t t = 0; t < a.num_types; ++t)
    extra_ptr[t + 1] = extra_ptr[t] + std::max<int64_t>(tile_ptr[t + 1] - tile_ptr[t] - 1, 0);
  for_tiles(a, tile_ptr, a.chunk, 1, [&](int64_t t, int64_t begin, int64_t end, int64_t part) {
    static thread_local Scratch scratch;
    scratch.dy.resize(kBlockRows * apart(sides.padded));
    std::fill_n(scratch.dy.data(), kBlockRows * apart(sides.padded), Value(0));
    if (a.num_in >= kWide) scratch.x.resize(kBlockRows * apart(a.num_in));
    Value* to = part ? a.extra + (extra_ptr[t] + part - 1) * size : a.y + t * size;
    const bool in_place = !sides.swapped && sides.padded == a.num_out;
    for (int64_t head = 0; head < a.num_heads; ++head) {
      if (!in_place) scratch.sum.resize(sides.one * sides.many);
      Value* const sums = in_place ? to : scratch.sum.data();
      std::fill_n(sums, sides.one * sides.many, Value(0));
      for (int64_t row = begin; row < end; row += kBlockRows)
        (sides.swapped ? add_block<true> : add_block<false>)(
            a, head, row, std::min(kBlockRows, end - row), sides, end, sums, scratch);
      if (in_place) {
        to += sides.one * sides.many;
        continue;
      }
      const int64_t per_input = sides.swapped ? 1 : sides.many;
      const int64_t per_output = sides.swapped ? sides.many : 1;
      for (int64_t k = 0; k < a.num_in; ++k)
        for (int64_t n = 0; n < a.num_out; ++n)
          *to++ = sums[k * per_input + n * per_output];
    }
  });
  dataeff::parallel_for(a.num_types, 8, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Value* to = a.y + t * size;
      if (tile_ptr[t] == tile_ptr[t + 1]) std::fill_n(to, size, Value(0));
      for (int64_t slot = extra_ptr[t]; slot < extra_ptr[t + 1]; ++slot)
        for (int64_t n = 0; n < size; ++n) to[n] += a.extra[slot * size + n];
    }
  });
}
"""

SUM = """
// y[t] = the sum of the rows of type t, through `gather`: four partial sums keep additions apart.
EXPORT void typed_sum(const Arguments* arguments) {
  const Arguments& a = *arguments;
  constexpr int kApart = 4;
  const std::vector<int64_t> tile_ptr = count_tiles(a, a.chunk);
  std::vector<Value> parts(tile_ptr.back() * a.num_in);
  for_tiles(a, tile_ptr, a.chunk, 1, [&](int64_t t, int64_t begin, int64_t end, int64_t part) {
    static thread_local std::vector<Value> sums;
    sums.assign(kApart * a.num_in, Value(0));
    for (int64_t row = begin; row < end; ++row) {
      const Value* x = source_row(a, row);
      Value* sum = sums.data() + (row - begin) % kApart * a.num_in;
      for (int64_t k = 0; k < a.num_in; ++k) sum[k] += x[k];
    }
    Value* to = parts.data() + (tile_ptr[t] + part) * a.num_in;
    for (int64_t k = 0; k < a.num_in; ++k) {
      to[k] = sums[k];
      for (int apart = 1; apart < kApart; ++apart) to[k] += sums[apart * a.num_in + k];
    }
  });
  for (int64_t t = 0; t < a.num_types; ++t) {
    Value* to = a.y + t * a.num_in;
    std::fill_n(to, a.num_in, Value(0));
    for (int64_t tile = tile_ptr[t]; tile < tile_ptr[t + 1]; ++tile)
      for (int64_t k = 0; k < a.num_in; ++k) to[k] += parts[tile * a.num_in + k];
  }
}
"""
