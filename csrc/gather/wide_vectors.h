// Loops that the compiler turns into vector code, for the 32-byte vectors of AVX2 where the
// processor has them and for the baseline where it has not. FMA stays out on purpose: a fused
// multiply-add rounds once where the reference rounds twice. DATAEFF_PORTABLE, which tests define,
// leaves the baseline alone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(DATAEFF_PORTABLE)
#define DATAEFF_WIDE __attribute__((target("avx2,f16c")))
// Whole lines at once, where the processor has AVX-512.
#define DATAEFF_LINE_WIDE __attribute__((target("avx2,f16c,avx512f")))
#define DATAEFF_HAS_WIDE 1
#else
#define DATAEFF_WIDE
#define DATAEFF_HAS_WIDE 0
#endif

namespace dataeff {

inline bool wide_vectors() {
#if DATAEFF_HAS_WIDE
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return supported;
#else
  return false;
#endif
}

inline bool line_wide_vectors() {
#if DATAEFF_HAS_WIDE
  static const bool supported = wide_vectors() && __builtin_cpu_supports("avx512f");
  return supported;
#else
  return false;
#endif
}

}  // namespace dataeff
