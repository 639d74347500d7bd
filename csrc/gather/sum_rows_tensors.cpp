#include "gather/sum_rows_tensors.h"

#include <algorithm>
#include <optional>

#include "gather/plain_tensors.h"
#include "gather/sum_rows.h"

namespace py = pybind11;

namespace dataeff {
namespace {

std::optional<Element> element_of(const DLTensor& rows) {
  const auto is = [&](int code, int bits) {
    return rows.dtype.code == code && rows.dtype.bits == bits && rows.dtype.lanes == 1;
  };
  if (is(kDlFloat, 32)) return Element::kFloat32;
  if (is(kDlFloat, 64)) return Element::kFloat64;
  if (is(kDlFloat, 16)) return Element::kFloat16;
  if (is(kDlBfloat, 16)) return Element::kBFloat16;
  return {};
}

// Whether `rows` is contiguous and [*index.shape, ...].
bool is_named_by(const DLTensor& rows, const DLTensor& index) {
  return rows.ndim >= index.ndim && std::equal(index.shape, index.shape + index.ndim, rows.shape) &&
         contiguous_numel(rows, 0) > 0;
}

// Whether `ids` is int64, [1, size], and `sums` contiguous of `width` times as many of the dtype.
bool are_new(const DLTensor& ids, const DLTensor& sums, const DLTensor& rows, int64_t size,
             int64_t width) {
  return ids.dtype.code == kDlInt && ids.dtype.bits == 64 && ids.ndim == 2 && ids.shape[0] == 1 &&
         ids.shape[1] == size && sums.dtype.code == rows.dtype.code &&
         sums.dtype.bits == rows.dtype.bits && contiguous_numel(sums, 0) == size * width;
}

// What `make` gave, filled; null, with or without an exception, where something is not plain.
PyObject* sum_plain(PyObject* index_object, PyObject* rows_object, int64_t num_rows,
                    int64_t padding, PyObject* make) {
  DLTensor index, rows, ids, sums;
  if (!unguarded() || !describe(index_object, index) || !describe(rows_object, rows))
    return nullptr;
  const auto numbers = row_index(index);
  const auto element = element_of(rows);
  if (!numbers || !element || !is_named_by(rows, index)) return nullptr;
  std::optional<NamedRows> named;
  if (!run_without_lock([&](int) { named.emplace(*numbers, num_rows, padding); })) return nullptr;
  const int64_t width = contiguous_numel(rows, 0) / numbers->size;
  auto made = py::reinterpret_steal<py::object>(PyObject_CallFunction(make, "L", named->size()));
  if (!made || !PyTuple_Check(made.ptr()) || PyTuple_GET_SIZE(made.ptr()) != 2) return nullptr;
  if (!describe(PyTuple_GET_ITEM(made.ptr(), 0), ids)) return nullptr;
  if (!describe(PyTuple_GET_ITEM(made.ptr(), 1), sums)) return nullptr;
  if (!are_new(ids, sums, rows, named->size(), width)) return nullptr;
  const auto write = [&](int threads) {
    named->write_ids(reinterpret_cast<int64_t*>(data(ids)), ids.strides ? ids.strides[1] : 1);
    named->sum(*element, data(rows), width, data(sums), threads);
  };
  return run_without_lock(write) ? made.release().ptr() : nullptr;
}

PyObject* sum_rows_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    PyErr_Format(PyExc_TypeError, "sum_rows_tensors takes 5 arguments, got %zd", count);
    return nullptr;
  }
  const int64_t num_rows = PyLong_AsLongLong(arguments[2]);
  const int64_t padding = PyLong_AsLongLong(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  PyObject* sums = sum_plain(arguments[0], arguments[1], num_rows, padding, arguments[4]);
  return sums ? sums : not_plain();
}

PyMethodDef methods[] = {
    {"sum_rows_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(sum_rows_tensors)),
     METH_FASTCALL,
     "sum_rows_tensors(index, rows, num_rows, padding, new) -> tuple[Tensor, Tensor] | None"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_sum_rows_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace dataeff
