#include "bindings.h"
#include "memory/register.h"

namespace py = pybind11;

namespace dataeff {

void bind_registration(py::module_& m) {
  py::class_<HostRegistration>(m, "HostRegistration")
      .def(py::init<uintptr_t, int64_t>(), py::arg("data"), py::arg("nbytes"),
           py::call_guard<py::gil_scoped_release>())
      .def("close", &HostRegistration::close, py::call_guard<py::gil_scoped_release>());
  // Which waits while another thread registers: a second for ten gigabytes.
  m.def("is_registered", &is_registered, py::arg("data"), py::arg("nbytes"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace dataeff
