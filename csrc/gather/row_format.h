// The formats in which a table may keep its rows smaller than they are delivered, element by
// element. The same code runs in the CPU gather, in the CUDA gather and in its host emulation.
//
// float16 and bfloat16 are the values rounded; int8 and float8 (e4m3: 4 bits of exponent, 3 of
// mantissa, no infinity) are multiples of a scale of the row, a float32 kept beside the rows.
// Nothing here depends on whether the processor flushes denormals to zero: narrow denormals are
// widened by subtracting normal numbers.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define DATAEFF_ELEMENT __host__ __device__ __forceinline__
#else
#define DATAEFF_ELEMENT inline __attribute__((always_inline))
#endif

namespace dataeff {

// How a row is kept. The numbers are those of dataeff/features/quantised.py.
enum class RowFormat : int { kFloat16 = 0, kBFloat16 = 1, kInt8 = 2, kFloat8 = 3 };
// What it is delivered as, and made of.
enum class Element : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

template <typename To, typename From>
DATAEFF_ELEMENT To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// By masks, not by `?:`, of which the compiler makes branches where one side is floating-point
// arithmetic, and then no vector code.
DATAEFF_ELEMENT uint32_t choose(bool first, uint32_t a, uint32_t b) {
  return b ^ ((a ^ b) & (0u - static_cast<uint32_t>(first)));
}

// --- widening: a code as float, before its scale ------------------------------------------------

DATAEFF_ELEMENT float float_of_half(uint16_t half) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  uint32_t bits = (half & 0x7fffu) << 13;
  const uint32_t exponent = bits & kExponent;
  bits += (127u - 15) << 23;
  const float subnormal = bits_as<float>(bits + (1u << 23)) - bits_as<float>(113u << 23);
  bits += choose(exponent == kExponent, (128u - 16) << 23, 0u);  // infinities and NaNs
  bits |= choose((half & 0x7fffu) > 0x7c00u, 1u << 22, 0u);      // quiet, as processors make them
  bits = choose(exponent == 0, bits_as<uint32_t>(subnormal), bits);
  return bits_as<float>(bits | (half & 0x8000u) << 16);
}

DATAEFF_ELEMENT float float_of_bfloat(uint16_t bfloat) {
  return bits_as<float>(static_cast<uint32_t>(bfloat) << 16);
}

DATAEFF_ELEMENT float float_of_float8(uint8_t code) {
  uint32_t bits = (code & 0x7fu) << 20;
  const bool subnormal = bits < 1u << 23;
  bits += (127u - 7) << 23;
  const float small = bits_as<float>(bits + (1u << 23)) - bits_as<float>(121u << 23);
  bits = choose(subnormal, bits_as<uint32_t>(small), bits);
  bits = choose((code & 0x7fu) == 0x7fu, 0x7fc00000u, bits);
  return bits_as<float>(bits | (code & 0x80u) << 24);
}

// --- narrowing: rounded to nearest, ties to even ------------------------------------------------

DATAEFF_ELEMENT uint16_t half_of_float(float value) {
  constexpr uint32_t kTooLarge = (127u + 16) << 23;  // 65536, where rounding to infinity is sure
  constexpr uint32_t kSmallest = (127u - 14) << 23;
  constexpr uint32_t kAlign = (127u - 15 + 23 - 10 + 1) << 23;
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t large = choose(size > 0x7f800000u, 0x7e00u, 0x7c00u);
  // Adding a number of the right size lets the adder round the bits that a denormal has left.
  const float shifted = bits_as<float>(choose(size < kSmallest, size, 0u)) + bits_as<float>(kAlign);
  const uint32_t small = bits_as<uint32_t>(shifted) - kAlign;
  const uint32_t normal = (size - ((127u - 15) << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
  const uint32_t half = choose(size >= kTooLarge, large, choose(size < kSmallest, small, normal));
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

DATAEFF_ELEMENT uint16_t bfloat_of_float(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(choose((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded));
}

// `value` within [-127, 127]: the sum's last bits are the rounded integer.
DATAEFF_ELEMENT int8_t int8_of_float(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return static_cast<int8_t>(bits_as<uint32_t>(value + kShift) & 0xffu);
}

// `value` within [-448, 448].
DATAEFF_ELEMENT uint8_t float8_of_float(float value) {
  constexpr uint32_t kSmallest = (127u - 6) << 23;
  constexpr uint32_t kAlign = (127u - 7 + 23 - 3 + 1) << 23;
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t size = bits & 0x7fffffffu;
  const float shifted = bits_as<float>(choose(size < kSmallest, size, 0u)) + bits_as<float>(kAlign);
  const uint32_t small = bits_as<uint32_t>(shifted) - kAlign;
  const uint32_t normal = (size - ((127u - 7) << 23) + 0x7ffffu + (size >> 20 & 1u)) >> 20;
  return static_cast<uint8_t>(choose(size < kSmallest, small, normal) | (bits >> 24 & 0x80u));
}

// --- formats and elements as types ---------------------------------------------------------------

struct Float16Rows {
  using Code = uint16_t;
  static constexpr bool kScaled = false;
  static DATAEFF_ELEMENT float widen(Code code) { return float_of_half(code); }
};

struct BFloat16Rows {
  using Code = uint16_t;
  static constexpr bool kScaled = false;
  static DATAEFF_ELEMENT float widen(Code code) { return float_of_bfloat(code); }
};

struct Int8Rows {
  using Code = uint8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = 127.0f;
  static DATAEFF_ELEMENT float widen(Code code) {
    return static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(code)));
  }
  static DATAEFF_ELEMENT Code narrow(float value) {
    return static_cast<Code>(int8_of_float(value));
  }
};

struct Float8Rows {
  using Code = uint8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = 448.0f;
  static DATAEFF_ELEMENT float widen(Code code) { return float_of_float8(code); }
  static DATAEFF_ELEMENT Code narrow(float value) { return float8_of_float(value); }
};

struct Float32Element {
  using Value = float;
  static DATAEFF_ELEMENT Value narrow(float value) { return value; }
  static DATAEFF_ELEMENT float widen(Value value) { return value; }
};

struct Float16Element {
  using Value = uint16_t;
  static DATAEFF_ELEMENT Value narrow(float value) { return half_of_float(value); }
  static DATAEFF_ELEMENT float widen(Value value) { return float_of_half(value); }
};

struct BFloat16Element {
  using Value = uint16_t;
  static DATAEFF_ELEMENT Value narrow(float value) { return bfloat_of_float(value); }
  static DATAEFF_ELEMENT float widen(Value value) { return float_of_bfloat(value); }
};

struct Float64Element {
  using Value = double;
  static DATAEFF_ELEMENT Value narrow(float value) { return value; }
  static DATAEFF_ELEMENT float widen(Value value) { return static_cast<float>(value); }
};

// One element of a row, as delivered.
template <typename Rows, typename Out>
DATAEFF_ELEMENT typename Out::Value decode(typename Rows::Code code, float scale) {
  const float value = Rows::widen(code);
  return Out::narrow(Rows::kScaled ? value * scale : value);
}

// Calls visit(Rows{}) for a format, visit(Out{}) for an element type.
template <typename Visit>
decltype(auto) with_format(RowFormat format, const Visit& visit) {
  switch (format) {
    case RowFormat::kFloat16:
      return visit(Float16Rows{});
    case RowFormat::kBFloat16:
      return visit(BFloat16Rows{});
    case RowFormat::kInt8:
      return visit(Int8Rows{});
    default:
      return visit(Float8Rows{});
  }
}

template <typename Visit>
decltype(auto) with_element(Element element, const Visit& visit) {
  switch (element) {
    case Element::kFloat32:
      return visit(Float32Element{});
    case Element::kFloat16:
      return visit(Float16Element{});
    case Element::kBFloat16:
      return visit(BFloat16Element{});
    default:
      return visit(Float64Element{});
  }
}

}  // namespace dataeff
