#include "gather/sum_rows.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "gather/copy_row.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int kPlaceBits = 32;
// Two passes instead of three for a million rows; of few keys the counters would be most of it.
constexpr int kFewBits = 8, kManyBits = 11;
constexpr size_t kMany = 4096;

// Sorts by the bits above the place, stable; `num_bits` of them are not zero.
void radix_sort(std::vector<uint64_t>& keys, int num_bits) {
  const int digit_bits = keys.size() < kMany ? kFewBits : kManyBits;
  std::vector<uint64_t> other(keys.size());
  std::vector<uint32_t> begins((1 << digit_bits) + 1);
  for (int shift = kPlaceBits; shift < kPlaceBits + num_bits; shift += digit_bits) {
    const auto digit = [=](uint64_t key) { return key >> shift & ((1 << digit_bits) - 1); };
    std::fill(begins.begin(), begins.end(), 0);
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

// Adds rows to the one that is in place.
template <typename Out>
class RowSum {
 public:
  using Value = typename Out::Value;

  explicit RowSum(int64_t width) : width_(width) {}
  void start(const Value*) {}
  void add(Value* __restrict to, const Value* __restrict row) {
    for (int64_t j = 0; j < width_; ++j) to[j] += row[j];
  }
  void finish(Value*) {}

 private:
  const int64_t width_;
};

// In float32: in bfloat16, 1 added to 256 is 256.
template <typename Out>
  requires(sizeof(typename Out::Value) == 2)
class RowSum<Out> {
 public:
  using Value = typename Out::Value;

  explicit RowSum(int64_t width) : total_(width) {}
  void start(const Value* row) {
    for (size_t j = 0; j < total_.size(); ++j) total_[j] = Out::widen(row[j]);
  }
  void add(Value*, const Value* row) {
    float* __restrict total = total_.data();
    for (size_t j = 0; j < total_.size(); ++j) total[j] += Out::widen(row[j]);
  }
  void finish(Value* to) {
    for (size_t j = 0; j < total_.size(); ++j) to[j] = Out::narrow(total_[j]);
  }

 private:
  std::vector<float> total_;
};

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

template <typename Out>
void NamedRows::sum_as(const typename Out::Value* rows, int64_t width, typename Out::Value* sums,
                       int num_threads) const {
  using Value = typename Out::Value;
  const int64_t nbytes = width * sizeof(Value);
  const auto num_named = static_cast<int64_t>(named_.size());
  if (num_named * nbytes <= kSerialNbytes) num_threads = 1;
  const int64_t grain = nbytes ? rows_per_piece(nbytes, size(), num_threads) : size();
  const int64_t ahead = nbytes ? rows_ahead(nbytes) / 4 : 0;
  const auto row = [=, this](int64_t i) {
    return reinterpret_cast<const std::byte*>(rows + place(i) * width);
  };
  parallel_for(size(), grain, num_threads, [=, this](int64_t begin, int64_t end) {
    RowSum<Out> sum(width);
    for (int64_t i = begin; i < end; ++i) {
      fetch_row(row(std::min(begins_[i] + ahead, num_named - 1)), nbytes);
      Value* to = sums + i * width;
      std::memcpy(to, rows + place(begins_[i]) * width, nbytes);
      if (begins_[i] + 1 == begins_[i + 1]) continue;
      sum.start(to);
      for (int64_t next = begins_[i] + 1; next < begins_[i + 1]; ++next)
        sum.add(to, rows + place(next) * width);
      sum.finish(to);
    }
  });
}

void NamedRows::sum(Element element, const std::byte* rows, int64_t width, std::byte* sums,
                    int num_threads) const {
  with_element(element, [&]<typename Out>(Out) {
    using Value = typename Out::Value;
    sum_as<Out>(reinterpret_cast<const Value*>(rows), width, reinterpret_cast<Value*>(sums),
                num_threads);
  });
}

}  // namespace dataeff
