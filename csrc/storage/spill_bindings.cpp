#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "bindings.h"
#include "errors.h"
#include "storage/striped_spill.h"
#include "storage/wait_heard.h"

namespace py = pybind11;

namespace dataeff {
namespace {

// Holds a Python object from C++, wherever the last of its holders goes.
std::shared_ptr<void> hold(py::object object) {
  if (object.is_none()) return nullptr;
  PyObject* held = object.release().ptr();
  return {held, [](void* ptr) {
            if (!Py_IsInitialized()) return;  // the interpreter has gone, and the object with it
            const PyGILState_STATE state = PyGILState_Ensure();
            Py_DECREF(static_cast<PyObject*>(ptr));
            PyGILState_Release(state);
          }};
}

char* at(uintptr_t address) { return reinterpret_cast<char*>(address); }

void warn(StripedSpill& spill) {
  for (const std::string& text : spill.take_warnings()) {
    if (PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) != 0) throw py::error_already_set();
  }
}

std::shared_ptr<Stripe> write(StripedSpill& self, uintptr_t data_ptr, int64_t nbytes,
                              py::object source) {
  std::shared_ptr<Stripe> stripe;
  {
    std::shared_ptr<void> held = hold(std::move(source));
    py::gil_scoped_release release;  // a reservation may take its time
    stripe = self.write(at(data_ptr), nbytes, std::move(held));
  }
  warn(self);
  return stripe;
}

void wait_for_write(Stripe& self, std::optional<double> timeout_s) {
  wait_heard(self, timeout_s, [&]() -> const Transfer& { return self.under_way(); });
  self.drop_source();
  warn(self.owner());
  if (const auto failure = self.failure()) throw OsError(failure->code, failure->text);
}

void wait_for_read(StripedRead& self, std::optional<double> timeout_s) {
  wait_heard(self, timeout_s, [&]() -> const Transfer& { return self.under_way(); });
  const SpillPart* part = self.failed();
  if (!part) return;
  const Transfer& transfer = *part->transfer;
  if (transfer.cancelled()) throw OsError(ECANCELED, transfer.describe() + " was cancelled");
  const Transfer::Failure& failure = *transfer.failure();
  if (!failure.end_of_file) throw OsError(failure.code, failure.text);
  throw EndOfFile(failure.text);
}

void bind_space(py::module_& m) {
  py::class_<SpillSpace, std::shared_ptr<SpillSpace>>(m, "SpillSpace")
      .def_static("open", &SpillSpace::open, py::arg("directory"), py::arg("flags"),
                  py::arg("named"), py::arg("limit"), py::arg("faults"),
                  py::call_guard<py::gil_scoped_release>())
      .def("allocate", &SpillSpace::allocate, py::arg("nbytes"),
           py::call_guard<py::gil_scoped_release>())
      .def("free", &SpillSpace::free, py::arg("offset"))
      .def("rounded", &SpillSpace::rounded, py::arg("nbytes"))
      .def("close", &SpillSpace::close)
      .def_property_readonly("fd", &SpillSpace::fd)
      .def_property_readonly("alignment", &SpillSpace::alignment)
      .def_property_readonly("reserved", &SpillSpace::reserved)
      .def_property_readonly("used", &SpillSpace::used)
      .def_property_readonly("peak", &SpillSpace::peak)
      .def_property_readonly("capacity", &SpillSpace::capacity);
}

void bind_stripe(py::module_& m) {
  py::class_<Stripe, std::shared_ptr<Stripe>>(m, "Stripe")
      .def("done", &Stripe::done)
      .def("wait", wait_for_write, py::arg("timeout_s") = py::none())
      .def("cancel",
           [](Stripe& self) {
             const bool cancelled = self.cancel();
             if (cancelled) self.drop_source();
             return cancelled;
           })
      .def(
          "read",
          [](Stripe& self, uintptr_t data_ptr, py::object target) {
            return self.read(at(data_ptr), hold(std::move(target)));
          },
          py::arg("data_ptr"), py::arg("target") = py::none())
      .def("free", &Stripe::free, py::call_guard<py::gil_scoped_release>())
      .def_readonly("nbytes", &Stripe::nbytes)
      .def_property_readonly("place", &Stripe::place)
      .def_property_readonly("start_ns", &Stripe::start_ns)
      .def_property_readonly("end_ns", &Stripe::end_ns);
  py::class_<StripedRead, std::shared_ptr<StripedRead>>(m, "StripedRead")
      .def("done", &StripedRead::done)
      .def("wait", wait_for_read, py::arg("timeout_s") = py::none())
      .def_property_readonly("failed_place",
                             [](const StripedRead& self) {
                               const SpillPart* part = self.done() ? self.failed() : nullptr;
                               return part ? part->place() : std::string();
                             })
      .def_property_readonly("start_ns", &StripedRead::start_ns)
      .def_property_readonly("end_ns", &StripedRead::end_ns);
}

}  // namespace

void bind_spill(py::module_& m) {
  bind_space(m);
  bind_stripe(m);
  py::class_<SpillLane>(m, "SpillLane")
      .def_readonly("engine", &SpillLane::engine)
      .def_readonly("in_flight_nbytes", &SpillLane::in_flight_nbytes)
      .def_readonly("written_nbytes", &SpillLane::written_nbytes)
      .def_readonly("rate", &SpillLane::rate)
      .def_readonly("num_failures", &SpillLane::num_failures)
      .def_readonly("retired", &SpillLane::retired);
  py::class_<StripedSpill, std::shared_ptr<StripedSpill>>(m, "StripedSpill")
      .def(py::init<std::optional<int64_t>>(), py::arg("chunk_nbytes"))
      .def("add", &StripedSpill::add, py::arg("space"), py::arg("engine"))
      .def("write", write, py::arg("data_ptr"), py::arg("nbytes"), py::arg("source") = py::none())
      .def("lanes", &StripedSpill::lanes)
      .def("close", &StripedSpill::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("used", &StripedSpill::used)
      .def_property_readonly("peak", &StripedSpill::peak);
}

}  // namespace dataeff
