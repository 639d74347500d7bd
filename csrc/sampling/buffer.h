// A growing array of plain values that is not initialised when it grows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

namespace dataeff {

// std::vector::resize would write every element once before the sampler writes it again.
template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept
      : data_(other.data_), size_(other.size_), capacity_(other.capacity_) {
    other.data_ = nullptr;
    other.size_ = other.capacity_ = 0;
  }
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  void clear() { size_ = 0; }

  // New elements are undefined until written.
  void resize(int64_t size) {
    reserve(size);
    size_ = size;
  }

  void push_back(T value) {
    reserve(size_ + 1);
    data_[size_++] = value;
  }

 private:
  void reserve(int64_t size) {
    if (size <= capacity_) return;
    const int64_t capacity = std::max<int64_t>({size, 2 * capacity_, 64});
    void* grown = std::realloc(data_, static_cast<size_t>(capacity) * sizeof(T));
    if (!grown) throw std::bad_alloc();
    data_ = static_cast<T*>(grown);
    capacity_ = capacity;
  }

  T* data_ = nullptr;
  int64_t size_ = 0;
  int64_t capacity_ = 0;
};

}  // namespace dataeff
