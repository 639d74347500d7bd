#include "storage/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace dataeff {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // bits reversed: the lowest bit is the highest power

// tables[k][b]: the register after byte `b` and then k zero bytes.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint64_t load_word(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

uint32_t by_table(const uint8_t* data, size_t nbytes, uint32_t crc) {
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    const uint64_t word = load_word(data) ^ crc;  // little-endian, as every supported processor is
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xFF];
  }
  for (; nbytes > 0; ++data, --nbytes) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFF];
  return crc;
}

#if defined(__x86_64__)

// The instruction yields a result per cycle but takes three to finish one, so three neighbouring
// blocks are summed at a time. Appending zero bytes is linear in the register: `Append` tabulates
// it for one block, and the three sums are joined with it.
constexpr size_t kBlockBytes = 4096;

class Append {
 public:
  Append() {
    for (int bit = 0; bit < 32; ++bit) {
      const uint32_t image = zeros(uint32_t{1} << bit);
      auto& table = tables_[bit / 8];
      const uint32_t step = uint32_t{1} << (bit % 8);
      for (uint32_t byte = 0; byte < 256; ++byte) {
        if (byte & step) table[byte] ^= image;
      }
    }
  }

  uint32_t operator()(uint32_t crc) const {
    return tables_[0][crc & 0xFF] ^ tables_[1][(crc >> 8) & 0xFF] ^ tables_[2][(crc >> 16) & 0xFF] ^
           tables_[3][crc >> 24];
  }

 private:
  static uint32_t zeros(uint32_t crc) {
    static constexpr uint8_t kZeros[kBlockBytes] = {};
    return by_table(kZeros, kBlockBytes, crc);
  }
  std::array<std::array<uint32_t, 256>, 4> tables_{};
};

__attribute__((target("sse4.2"))) uint32_t by_instruction(const uint8_t* data, size_t nbytes,
                                                          uint32_t crc) {
  static const Append append;
  for (; nbytes >= 3 * kBlockBytes; data += 3 * kBlockBytes, nbytes -= 3 * kBlockBytes) {
    uint64_t first = crc, second = 0, third = 0;
    for (size_t i = 0; i < kBlockBytes; i += 8) {
      first = _mm_crc32_u64(first, load_word(data + i));
      second = _mm_crc32_u64(second, load_word(data + kBlockBytes + i));
      third = _mm_crc32_u64(third, load_word(data + 2 * kBlockBytes + i));
    }
    crc = append(append(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second)) ^
          static_cast<uint32_t>(third);
  }
  uint64_t wide = crc;
  for (; nbytes >= 8; data += 8, nbytes -= 8) wide = _mm_crc32_u64(wide, load_word(data));
  crc = static_cast<uint32_t>(wide);
  for (; nbytes > 0; ++data, --nbytes) crc = _mm_crc32_u8(crc, *data);
  return crc;
}

#endif

}  // namespace

bool crc32c_in_hardware() {
#if defined(__x86_64__)
  static const bool there = __builtin_cpu_supports("sse4.2");
  return there;
#else
  return false;
#endif
}

uint32_t crc32c_by_table(const void* data, size_t nbytes, uint32_t crc) {
  return ~by_table(static_cast<const uint8_t*>(data), nbytes, ~crc);
}

uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc) {
#if defined(__x86_64__)
  if (crc32c_in_hardware()) {
    return ~by_instruction(static_cast<const uint8_t*>(data), nbytes, ~crc);
  }
#endif
  return crc32c_by_table(data, nbytes, crc);
}

}  // namespace dataeff
