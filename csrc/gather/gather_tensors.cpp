#include "gather/gather_tensors.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>

#include "gather/gather.h"
#include "gather/plain_tensors.h"
#include "gather/stored_rows.h"

namespace py = pybind11;

namespace dataeff {
namespace {

// From here on a new tensor wants huge pages, which the long way sees to.
constexpr int64_t kNewNbytes = 4 << 20;
constexpr int kMostDims = 16;

std::optional<RowTable> row_table(const DLTensor& table) {
  // Complex numbers may be conjugated when they are read, which this description does not tell.
  if (table.ndim == 0 || table.dtype.code == kDlComplex || table.dtype.bits % 8) return {};
  const int64_t row_numel = contiguous_numel(table, 1);
  const int64_t row_nbytes = row_numel * itemsize(table);
  if (row_numel <= 0 || table.shape[0] == 0) return {};
  int64_t stride = table.strides ? table.strides[0] : row_numel;
  if (table.shape[0] == 1) stride = row_numel;
  // So may imaginary parts, negated, which are every second number.
  if (row_numel == 1 && stride != 1) return {};
  return RowTable{data(table), table.shape[0], row_nbytes, stride * itemsize(table)};
}

bool of_one_dtype(const DLTensor& a, const DLTensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits &&
         a.dtype.lanes == b.dtype.lanes;
}

// Whether `out` is contiguous and [*index.shape, *table.shape[1:]].
bool is_rows(const DLTensor& out, const DLTensor& table, const DLTensor& index) {
  return out.ndim == index.ndim + table.ndim - 1 &&
         std::equal(index.shape, index.shape + index.ndim, out.shape) &&
         std::equal(table.shape + 1, table.shape + table.ndim, out.shape + index.ndim) &&
         contiguous_numel(out, 0) > 0;
}

bool apart(const std::byte* x, int64_t x_nbytes, const std::byte* y, int64_t y_nbytes) {
  return x + x_nbytes <= y || y + y_nbytes <= x;
}

bool apart(const std::byte* out, int64_t nbytes, const RowTable& table, const RowIndex& index) {
  if (table.row_stride < 0) return false;
  return apart(out, nbytes, table.data,
               (table.num_rows - 1) * table.row_stride + table.row_nbytes) &&
         apart(out, nbytes, static_cast<const std::byte*>(index.data), index.size * index.itemsize);
}

// `out`, or where it is None like.new_empty(*index.shape, *table.shape[1:]) of less than
// kNewNbytes; null, with an exception set when torch refuses, elsewhere.
py::object rows_or_new(PyObject* out, PyObject* like, const DLTensor& table, const DLTensor& index,
                       int64_t nbytes) {
  if (out != Py_None) return py::reinterpret_borrow<py::object>(out);
  if (nbytes >= kNewNbytes || index.ndim + table.ndim - 1 > kMostDims) return {};
  std::array<PyObject*, kMostDims + 1> arguments{like};
  size_t count = 1;
  for (int dim = 0; dim < index.ndim; ++dim)
    arguments[count++] = PyLong_FromLongLong(index.shape[dim]);
  for (int dim = 1; dim < table.ndim; ++dim)
    arguments[count++] = PyLong_FromLongLong(table.shape[dim]);
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* rows = PyObject_VectorcallMethod(new_empty, arguments.data(), count, nullptr);
  for (size_t i = 1; i < count; ++i) Py_XDECREF(arguments[i]);
  return py::reinterpret_steal<py::object>(rows);
}

void enter(int64_t* tally, int64_t num_rows, int64_t nbytes) {
  const int64_t amounts[] = {1, num_rows, nbytes};
  for (int i = 0; i < 3; ++i)
    std::atomic_ref(tally[i]).fetch_add(amounts[i], std::memory_order_relaxed);
}

// A new reference to the rows, or null, with or without an exception, where something is not plain.
PyObject* gather_plain(PyObject* table_object, PyObject* index_object, PyObject* out_object,
                       int64_t* tally) {
  DLTensor table, index, out;
  if (!unguarded()) return nullptr;
  if (!describe(table_object, table) || !describe(index_object, index)) return nullptr;
  const auto from = row_table(table);
  const auto ids = row_index(index);
  if (!from || !ids) return nullptr;
  const int64_t nbytes = ids->size * from->row_nbytes;
  py::object rows = rows_or_new(out_object, table_object, table, index, nbytes);
  if (!rows || !describe(rows.ptr(), out) || !of_one_dtype(out, table)) return nullptr;
  if (!is_rows(out, table, index) || !apart(data(out), nbytes, *from, *ids)) return nullptr;
  const auto gather = [&](int threads) { gather_cpu(*from, *ids, data(out), threads); };
  if (!run_without_lock(gather)) return nullptr;
  if (tally) enter(tally, ids->size, nbytes);
  return rows.release().ptr();
}

bool are_scales(const DLTensor& scales, int64_t num_rows) {
  return scales.dtype.code == kDlFloat && scales.dtype.bits == 32 && scales.ndim == 1 &&
         scales.shape[0] == num_rows && contiguous_numel(scales, 0) == num_rows;
}

// A new reference to the rows of `table`, kept as `coding` says and widened; or null, as above.
PyObject* gather_widened(PyObject* table_object, PyObject* scales_object, PyObject* index_object,
                         PyObject* out_object, PyObject* like, RowCoding coding, int64_t* tally) {
  DLTensor table, scales, index, out;
  if (!unguarded()) return nullptr;
  if (!describe(table_object, table) || !describe(index_object, index)) return nullptr;
  const auto from = row_table(table);
  const auto ids = row_index(index);
  if (!from || !ids || itemsize(table) != code_nbytes(coding.format)) return nullptr;
  const int64_t out_nbytes =
      ids->size * from->row_nbytes / itemsize(table) * element_nbytes(coding.element);
  py::object rows = rows_or_new(out_object, like, table, index, out_nbytes);
  if (!rows || !describe(rows.ptr(), out) || !is_rows(out, table, index)) return nullptr;
  if (itemsize(out) != element_nbytes(coding.element) || out.dtype.code == kDlInt) return nullptr;
  int64_t row_nbytes = from->row_nbytes;
  if (scales_object != Py_None) {
    if (!describe(scales_object, scales) || !are_scales(scales, from->num_rows)) return nullptr;
    coding.scales = reinterpret_cast<const float*>(data(scales));
    row_nbytes += sizeof(float);
  }
  if (!apart(data(out), out_nbytes, *from, *ids)) return nullptr;
  const auto gather = [&](int threads) {
    gather_decoded_cpu(*from, coding, *ids, data(out), threads);
  };
  if (!run_without_lock(gather)) return nullptr;
  enter(tally, ids->size, ids->size * row_nbytes);
  return rows.release().ptr();
}

// Not by pybind11's dispatch, which takes as long as fifty rows do.
PyObject* gather_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) {
    PyErr_Format(PyExc_TypeError, "gather_tensors takes 4 arguments, got %zd", count);
    return nullptr;
  }
  auto* tally = static_cast<int64_t*>(PyLong_AsVoidPtr(arguments[3]));
  if (PyErr_Occurred()) return nullptr;
  if (PyObject* rows = gather_plain(arguments[0], arguments[1], arguments[2], tally)) return rows;
  return not_plain();
}

PyObject* gather_stored_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 8) {
    PyErr_Format(PyExc_TypeError, "gather_stored_tensors takes 8 arguments, got %zd", count);
    return nullptr;
  }
  const RowCoding coding{static_cast<RowFormat>(PyLong_AsLong(arguments[5])),
                         static_cast<Element>(PyLong_AsLong(arguments[6])), nullptr};
  auto* tally = static_cast<int64_t*>(PyLong_AsVoidPtr(arguments[7]));
  if (PyErr_Occurred()) return nullptr;
  PyObject* rows = gather_widened(arguments[0], arguments[1], arguments[2], arguments[3],
                                  arguments[4], coding, tally);
  return rows ? rows : not_plain();
}

PyMethodDef methods[] = {
    {"gather_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(gather_tensors)),
     METH_FASTCALL, "gather_tensors(table, index, out, tally) -> Tensor | None"},
    {"gather_stored_tensors",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(gather_stored_tensors)), METH_FASTCALL,
     "gather_stored_tensors(table, scales, index, out, like, format, element, tally)"
     " -> Tensor | None"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_gather_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace dataeff
