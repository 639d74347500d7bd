#include "gather/sum_rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "gather/copy_row.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int kDigitBits = 8;
constexpr int kPlaceBits = 32;

// Sorts by the bits above the place, stable; `num_bits` of them are not zero.
void radix_sort(std::vector<uint64_t>& keys, int num_bits) {
  std::vector<uint64_t> other(keys.size());
  for (int shift = kPlaceBits; shift < kPlaceBits + num_bits; shift += kDigitBits) {
    const auto digit = [shift](uint64_t key) { return key >> shift & ((1 << kDigitBits) - 1); };
    std::array<uint32_t, (1 << kDigitBits) + 1> begins{};
    for (const uint64_t key : keys) ++begins[digit(key) + 1];
    for (size_t i = 1; i < begins.size(); ++i) begins[i] += begins[i - 1];
    for (const uint64_t key : keys) other[begins[digit(key)]++] = key;
    keys.swap(other);
  }
}

template <typename Id>
std::vector<uint64_t> named_by(const Id* ids, int64_t size, int64_t num_rows, int64_t padding) {
  std::vector<uint64_t> named;
  named.reserve(size);
  for (int64_t place = 0; place < size; ++place) {
    int64_t row = ids[place];
    row += (row >> 63) & num_rows;
    if (row != padding) named.push_back(static_cast<uint64_t>(row) << kPlaceBits | place);
  }
  return named;
}

}  // namespace

NamedRows::NamedRows(const RowIndex& index, int64_t num_rows, int64_t padding) {
  if (num_rows >> kPlaceBits || index.size >> kPlaceBits)
    throw std::invalid_argument("more rows, or places, than 32 bits count");
  check_index(index, num_rows, 1);
  named_ = index.itemsize == 4
               ? named_by(static_cast<const int32_t*>(index.data), index.size, num_rows, padding)
               : named_by(static_cast<const int64_t*>(index.data), index.size, num_rows, padding);
  radix_sort(named_, std::bit_width(static_cast<uint64_t>(num_rows)));
  const auto num_named = static_cast<int64_t>(named_.size());
  for (int64_t i = 0; i < num_named; ++i)
    if (i == 0 || named_[i] >> kPlaceBits != named_[i - 1] >> kPlaceBits) begins_.push_back(i);
  begins_.push_back(num_named);
}

void NamedRows::write_ids(int64_t* ids, int64_t stride) const {
  for (int64_t i = 0; i < size(); ++i)
    ids[i * stride] = static_cast<int64_t>(named_[begins_[i]] >> kPlaceBits);
}

template <typename Value>
void NamedRows::sum(const Value* rows, int64_t width, Value* sums, int num_threads) const {
  const int64_t nbytes = width * sizeof(Value);
  const auto num_named = static_cast<int64_t>(named_.size());
  if (num_named * nbytes <= kSerialNbytes) num_threads = 1;
  const int64_t grain = nbytes ? rows_per_piece(nbytes, size(), num_threads) : size();
  parallel_for(size(), grain, num_threads, [=, this](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Value* __restrict to = sums + i * width;
      std::memcpy(to, rows + place(begins_[i]) * width, nbytes);
      for (int64_t next = begins_[i] + 1; next < begins_[i + 1]; ++next) {
        const Value* __restrict from = rows + place(next) * width;
        for (int64_t j = 0; j < width; ++j) to[j] += from[j];
      }
    }
  });
}

template void NamedRows::sum(const float*, int64_t, float*, int) const;
template void NamedRows::sum(const double*, int64_t, double*, int) const;

}  // namespace dataeff
