// The store side of the CUDA gather of rows that are widened on their way: what a lane does with
// its word of codes. The bus has carried the small row; the wide one is written to the GPU's own
// memory.
#pragma once

#include "gather/gather_index.h"
#include "gather/row_format.h"

namespace dataeff {

template <typename Rows, typename Out>
struct StoreDecoded {
  using Code = typename Rows::Code;
  using Value = typename Out::Value;
  static constexpr int kCodesPerStore = kWordNbytes / sizeof(Value);

  std::byte* out;
  const float* scales;

  // To be asked for beside the word, whose way is the longer: after it each would be waited for.
  DATAEFF_HOST_DEVICE float scale_of(const WordCopy& copy) const {
    // A wrong index has no row to ask for a scale; its word is zero and stays zero.
    return Rows::kScaled && copy.begin < copy.end && copy.readable ? scales[copy.row] : 1.0f;
  }

  // A whole word of codes becomes two to eight whole words of values where the output is aligned;
  // otherwise the values are stored one by one.
  template <typename StoreWord>
  DATAEFF_HOST_DEVICE void operator()(const WordCopy& copy, const Word& word, float scale,
                                      const StoreWord& store_word) const {
    if (copy.begin == copy.end) return;
    const uintptr_t to =
        reinterpret_cast<uintptr_t>(out) + copy.offset / sizeof(Code) * sizeof(Value);
    if (copy.end - copy.begin == kWordNbytes && to % kWordNbytes == 0) {
      store_whole(word, to, scale, store_word);
    } else {
      auto* value = reinterpret_cast<Value*>(to);
      for (uintptr_t from = copy.begin; from < copy.end; from += sizeof(Code))
        *value++ = decode<Rows, Out>(unit_of<Code>(word, from), scale);
    }
  }

 private:
  template <typename StoreWord>
  static DATAEFF_HOST_DEVICE void store_whole(const Word& word, uintptr_t to, float scale,
                                              const StoreWord& store_word) {
    constexpr int kStores = kWordNbytes / sizeof(Code) / kCodesPerStore;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int store = 0; store < kStores; ++store)
      store_word(to + store * kWordNbytes, values_of(word, store * kCodesPerStore, scale));
  }

  static DATAEFF_HOST_DEVICE Word values_of(const Word& word, int first, float scale) {
    uint64_t halves[2] = {0, 0};
    constexpr int kPerHalf = kCodesPerStore / 2;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < kCodesPerStore; ++i) {
      const Code code = unit_of<Code>(word, (first + i) * sizeof(Code));
      halves[i / kPerHalf] |= bits_of(decode<Rows, Out>(code, scale))
                              << (i % kPerHalf * sizeof(Value) * 8);
    }
    return {halves[0], halves[1]};
  }

  static DATAEFF_HOST_DEVICE uint64_t bits_of(Value value) {
    if constexpr (sizeof(Value) == 8) return bits_as<uint64_t>(value);
    if constexpr (sizeof(Value) == 4) return bits_as<uint32_t>(value);
    if constexpr (sizeof(Value) == 2) return value;
  }
};

}  // namespace dataeff
