// dataeff._core: the torch-free core as a Python module.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "errors.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The torch-free core of dataeff: raw pointers, byte counts and integer stream handles.";
#ifdef DATAEFF_WITH_CUDA
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const dataeff::OsError& e) {
      // OSError(errno, text, path) picks FileNotFoundError, PermissionError ... by errno.
      const py::object path = e.path().empty() ? py::object(py::none()) : py::str(e.path());
      const py::object raised = py::reinterpret_steal<py::object>(
          PyObject_CallFunction(PyExc_OSError, "isO", e.code(), e.what(), path.ptr()));
      if (raised) PyErr_SetObject(py::type::handle_of(raised).ptr(), raised.ptr());
    } catch (const dataeff::EndOfFile& e) {
      PyErr_SetString(PyExc_EOFError, e.what());
    }
  });
  dataeff::bind_memory(m);
  dataeff::bind_registration(m);
  dataeff::bind_storage(m);
  dataeff::bind_spill(m);
  dataeff::bind_stored_rows(m);
  dataeff::bind_gather(m);
  dataeff::bind_sampling(m);
  dataeff::bind_parallel(m);
  dataeff::bind_graph(m);
}
