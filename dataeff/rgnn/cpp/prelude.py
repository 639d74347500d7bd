"""What generated C++ starts with: types, elementary functions, and sums of exponentials.

<cmath> and <algorithm> take as long to read as a kernel takes to compile, 0.16 of 0.4 s with gcc
12, so the few functions that kernels call are the compiler's builtins. `exp`, `tanh` and the normal
distribution are written out for float: a call in a loop over edges spills the row that is being
added up, and one over a row's elements cannot be vectorised. A million elements on one Zen 4 core,
least of 20: `expf` 2.2 ms, written out 0.3 ms, within 0.92 units in the last place.
"""

from __future__ import annotations

_TYPES = """\
#include <stdint.h>

using T = {scalar};
using I = {index};

namespace math {{
[[maybe_unused]] inline T log(T x) {{ return __builtin_log{f}(x); }}
[[maybe_unused]] inline T sqrt(T x) {{ return __builtin_sqrt{f}(x); }}
[[maybe_unused]] inline T max(T x, T y) {{ return x < y ? y : x; }}
// x * y + z, in one step where the processor has it.
[[maybe_unused]] inline T fused(T x, T y, T z) {{
#ifdef __FP_FAST_FMA{F}
  return __builtin_fma{f}(x, y, z);
#else
  return x * y + z;
#endif
}}
// As torch's: what is no number stays so.
[[maybe_unused]] inline T maximum(T x, T y) {{ return x < y || y != y ? y : x; }}
"""

_DOUBLE = """\
[[maybe_unused]] inline T exp(T x) { return __builtin_exp(x); }
[[maybe_unused]] inline T tanh(T x) { return __builtin_tanh(x); }
// The normal distribution function.
[[maybe_unused]] inline T normal(T x) {
  return T(0.5) * (T(1) + __builtin_erf(x * T(0.70710678118654752)));
}
}  // namespace math
"""

_FLOAT = """\
inline float power_of_two(int32_t n) {
  const int32_t bits = (n + 127) << 23;
  float found;
  __builtin_memcpy(&found, &bits, sizeof found);
  return found;
}
// exp(r + n ln 2) for |r| <= ln 2 / 2, by r's power series; 2^n in two factors, so that results
// that are subnormal or infinite come out right.
[[maybe_unused]] inline float exp(float x) {
  x = x > 89.5f ? 89.5f : x;
  x = x < -105.0f ? -105.0f : x;
  const float shifted = fused(x, 1.44269504f, 12582912.0f);  // rounds to a whole number
  const float n = shifted - 12582912.0f;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  float p = 1.0f / 5040.0f;
  p = fused(p, r, 1.0f / 720.0f);
  p = fused(p, r, 1.0f / 120.0f);
  p = fused(p, r, 1.0f / 24.0f);
  p = fused(p, r, 1.0f / 6.0f);
  p = fused(p, r, 0.5f);
  p = fused(p, r, 1.0f);
  p = fused(p, r, 1.0f);
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}
// By exp, and near 0, where that would cancel, by five levels of Lambert's continued fraction
// x / (1 + x^2 / (3 + x^2 / (5 + ...))).
[[maybe_unused]] inline float tanh(float x) {
  const float y = __builtin_fabsf(x), z = x * x;
  const float near =
      y * fused(z + 105.0f, z, 945.0f) / fused(fused(15.0f, z, 420.0f), z, 945.0f);
  const float far = 1.0f - 2.0f / (exp(2.0f * y) + 1.0f);
  return __builtin_copysignf(y < 0.625f ? near : far, x);
}
// The normal distribution function, to 1e-7: Abramowitz and Stegun, 7.1.26.
[[maybe_unused]] inline float normal(float x) {
  const float y = __builtin_fabsf(x) * 0.70710678f, t = 1.0f / fused(0.3275911f, y, 1.0f);
  float p = 1.061405429f;
  p = fused(p, t, -1.453152027f);
  p = fused(p, t, 1.421413741f);
  p = fused(p, t, -0.284496736f);
  p = fused(p, t, 0.254829592f);
  const float tail = 0.5f * p * t * exp(-y * y);
  return x < 0.0f ? tail : 1.0f - tail;
}
}  // namespace math
"""

_FUNCTIONS = """\

namespace {{
[[maybe_unused]] constexpr T kInfinity = __builtin_inf{f}();
// How many iterations ahead what an index leads to is fetched.
[[maybe_unused]] constexpr int64_t kAhead = 8;
template <int Elements, class Element>
inline void prefetch(const Element* row) {{
  for (int k = 0; k < Elements; k += 64 / int(sizeof(Element))) __builtin_prefetch(row + k);
}}
[[maybe_unused]] inline T relu(T x) {{ return x < T(0) ? T(0) : x; }}
[[maybe_unused]] inline T leaky_relu(T x, T slope) {{ return x > T(0) ? x : x * slope; }}
[[maybe_unused]] inline T gelu(T x) {{ return x * math::normal(x); }}
[[maybe_unused]] inline T gelu_grad(T x) {{
  return math::normal(x) + x * math::exp(T(-0.5) * x * x) * T(0.39894228040143268);
}}
// The logarithm of a sum of exponentials, relative to the largest exponent: terms are kept until
// there is a vector of them. That of no terms is infinite.
struct Exponents {{
  static constexpr int kBlock = 64 / int(sizeof(T));
  T top = -kInfinity, highest = -kInfinity, sum = T(0), terms[kBlock];
  int filled = 0;
  Exponents() {{ clear(); }}
  void clear() {{
    filled = 0;
    for (int k = 0; k < kBlock; ++k) terms[k] = -kInfinity;
  }}
  void add(T x) {{  // here, and not of all terms at once, the maximum waits for nothing
    highest = math::max(highest, x);
    terms[filled++] = x;
    if (filled == kBlock) take();
  }}
  void take() {{
    if (highest == -kInfinity) {{  // no number among them, or none that counts
      for (int k = 0; k < kBlock; ++k) sum = terms[k] == terms[k] ? sum : terms[k];
      return clear();
    }}
    T total = T(0);
#pragma omp simd reduction(+ : total)
    for (int k = 0; k < kBlock; ++k) total += math::exp(terms[k] - highest);
    if (top != -kInfinity) sum *= math::exp(top - highest);  // most segments are one vector
    sum += total;
    top = highest;
    clear();
  }}
  T log() {{
    if (filled) take();
    return sum == T(0) ? kInfinity : math::log(sum);
  }}
}};
}}  // namespace

"""


def prelude(scalar: str, index: str) -> str:
    """The text in front of kernels of these C++ types."""
    f = "f" if scalar == "float" else ""
    types = _TYPES.format(scalar=scalar, index=index, f=f, F=f.upper())
    return types + (_FLOAT if f else _DOUBLE) + _FUNCTIONS.format(f=f)
