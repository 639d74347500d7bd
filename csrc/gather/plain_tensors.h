// Tensors as the core may read them by itself: a hundred rows are copied in less time than Python
// takes to read an address, a shape and a stride from each of three tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "gather/gather.h"
#include "memory/dlpack.h"

namespace dataeff {

// Adds to `m`:
//
// use_tensors(exchange_api, kinds, guards, get_num_threads): tells what a tensor is. `exchange_api`
// is DLPack's capsule of the tensor type, kinds are the types that are exactly a tensor and its
// memory, and while one of the functions `guards` returns what is true no tensor is plain.
void bind_plain_tensors(pybind11::module_& m);

// Whether tensors are known and nobody watches or changes operators. False also when one of the
// guards raises; then the exception stays set.
bool unguarded();

// Whether `object` is exactly a tensor in host memory, which `tensor` then describes.
bool describe(PyObject* object, DLTensor& tensor);

inline std::byte* data(const DLTensor& tensor) {
  return static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
}

inline int64_t itemsize(const DLTensor& tensor) {
  return tensor.dtype.bits * tensor.dtype.lanes / 8;
}

// The elements of dimensions `from` and later; -1 when they do not follow one another.
int64_t contiguous_numel(const DLTensor& tensor, int from);

// Of int32 or int64, contiguous and not empty.
std::optional<RowIndex> row_index(const DLTensor& index);

// The calling thread's number where it was told one, or else torch's; with an exception set when
// that raises.
int num_loop_threads();

// None, where something is not plain; but Ctrl-C is passed on.
PyObject* not_plain();

// Calls work(num_threads) without the interpreter's lock. False where it throws: an index is out of
// range, or the system refuses something.
bool run_without_lock(const auto& work) {
  const int threads = num_loop_threads();
  if (PyErr_Occurred()) return false;
  bool done = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    work(threads);
  } catch (...) {
    done = false;
  }
  Py_END_ALLOW_THREADS;
  return done;
}

}  // namespace dataeff
