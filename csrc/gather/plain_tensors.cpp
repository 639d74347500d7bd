#include "gather/plain_tensors.h"

#include <vector>

#include "parallel/parallel_for.h"

namespace py = pybind11;

namespace dataeff {
namespace {

// What use_tensors was told. References that are never given back: the interpreter outlives them.
struct Tensors {
  const DLPackExchangeApi* api = nullptr;
  std::vector<PyObject*> kinds{};
  std::vector<PyObject*> guards{};
  PyObject* get_num_threads = nullptr;
};

Tensors tensors;

bool is_plain(PyObject* object) {
  for (PyObject* kind : tensors.kinds)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == kind) return true;
  return false;
}

std::vector<PyObject*> kept(const py::tuple& objects) {
  std::vector<PyObject*> all;
  for (const py::handle object : objects) all.push_back(object.inc_ref().ptr());
  return all;
}

void use_tensors(const py::capsule& exchange_api, const py::tuple& kinds, const py::tuple& guards,
                 py::object get_num_threads) {
  const auto* api = exchange_api.get_pointer<DLPackExchangeApi>();
  if (api->major_version != 1 || !api->describe) return;  // every call goes the long way
  tensors = {api, kept(kinds), kept(guards), get_num_threads.release().ptr()};
}

}  // namespace

bool unguarded() {
  if (!tensors.api) return false;
  for (PyObject* guard : tensors.guards) {
    PyObject* answer = PyObject_CallNoArgs(guard);
    if (!answer) return false;
    const int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (truth) return false;
  }
  return true;
}

bool describe(PyObject* object, DLTensor& tensor) {
  return is_plain(object) && tensors.api->describe(object, &tensor) == 0 &&
         tensor.device.device_type == kDlCpu;
}

int64_t contiguous_numel(const DLTensor& tensor, int from) {
  int64_t numel = 1;
  for (int dim = tensor.ndim - 1; dim >= from; --dim) {
    const int64_t size = tensor.shape[dim];
    if (size != 1 && tensor.strides && tensor.strides[dim] != numel) return -1;
    numel *= size;
  }
  return numel;
}

std::optional<RowIndex> row_index(const DLTensor& index) {
  if (index.dtype.code != kDlInt || index.dtype.lanes != 1) return {};
  if (index.dtype.bits != 32 && index.dtype.bits != 64) return {};
  const int64_t size = contiguous_numel(index, 0);
  if (size <= 0) return {};
  return RowIndex{data(index), size, index.dtype.bits / 8};
}

int num_loop_threads() {
  if (const int told = loop_threads_here()) return told;
  PyObject* answer = PyObject_CallNoArgs(tensors.get_num_threads);
  const long number = answer ? PyLong_AsLong(answer) : 1;
  Py_XDECREF(answer);
  return static_cast<int>(number);
}

PyObject* not_plain() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
  PyErr_Clear();  // the long way meets it again, and says what it was
  Py_RETURN_NONE;
}

void bind_plain_tensors(py::module_& m) {
  m.def("use_tensors", &use_tensors, py::arg("exchange_api"), py::arg("kinds"), py::arg("guards"),
        py::arg("get_num_threads"));
}

}  // namespace dataeff
