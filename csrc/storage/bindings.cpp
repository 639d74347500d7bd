#include "bindings.h"

#include <pybind11/stl.h>

#include "errors.h"
#include "storage/alignment.h"
#include "storage/crc32c.h"
#include "storage/engine.h"
#include "storage/wait_heard.h"

namespace py = pybind11;

namespace dataeff {
namespace {

using std::chrono::nanoseconds;

std::optional<Op> op_of(const std::string& name) {
  if (name == "read") return Op::kRead;
  if (name == "write") return Op::kWrite;
  if (name == "reserve") return Op::kReserve;
  if (name == "any") return std::nullopt;
  throw std::invalid_argument("op='" + name + "' is not one of read, write, reserve, any");
}

FaultPlan& add_fault(FaultPlan& plan, const std::string& op, int error,
                     std::optional<int64_t> max_nbytes, double delay_s, bool corrupt, int64_t nth,
                     int64_t every, std::optional<int64_t> times) {
  const nanoseconds delay{static_cast<int64_t>(delay_s * 1e9)};
  plan.add(op_of(op), {error, max_nbytes, delay, corrupt}, nth, every, times);
  return plan;
}

std::shared_ptr<Transfer> submit(Engine& engine, Op op, int fd, uintptr_t data, int64_t nbytes,
                                 int64_t offset) {
  return engine.submit(op, fd, reinterpret_cast<char*>(data), nbytes, offset);
}

[[noreturn]] void raise_failure(const Transfer& transfer) {
  if (transfer.cancelled()) throw OsError(ECANCELED, transfer.describe() + " was cancelled");
  const Transfer::Failure& failure = *transfer.failure();
  if (!failure.end_of_file) throw OsError(failure.code, failure.text);
  throw EndOfFile(failure.text);
}

void wait(Transfer& transfer, std::optional<double> timeout_s) {
  wait_heard(transfer, timeout_s, [&]() -> const Transfer& { return transfer; });
  if (transfer.cancelled() || transfer.failure()) raise_failure(transfer);
}

void bind_transfer(py::module_& m) {
  py::class_<Transfer, std::shared_ptr<Transfer>>(m, "Transfer")
      .def("wait", wait, py::arg("timeout_s") = py::none())
      .def("done", &Transfer::done)
      .def("cancel", &Transfer::cancel)
      .def("cancelled", &Transfer::cancelled)
      .def("failed", [](const Transfer& self) { return self.failure() != nullptr; })
      .def_readonly("nbytes", &Transfer::nbytes)
      .def_readonly("offset", &Transfer::offset)
      .def_property_readonly("op", [](const Transfer& self) { return op_name(self.op); })
      .def_property_readonly("start_ns", &Transfer::start_ns)
      .def_property_readonly("end_ns", &Transfer::end_ns)
      .def("__repr__", [](const Transfer& self) { return "<Transfer: " + self.describe() + ">"; });
}

void bind_fault_plan(py::module_& m) {
  py::class_<FaultPlan, std::shared_ptr<FaultPlan>>(m, "FaultPlan")
      .def(py::init<>())
      .def("add", add_fault, py::arg("op"), py::kw_only(), py::arg("error") = 0,
           py::arg("max_nbytes") = py::none(), py::arg("delay_s") = 0.0, py::arg("corrupt") = false,
           py::arg("nth") = 1, py::arg("every") = 1, py::arg("times") = py::none(),
           py::return_value_policy::reference_internal)
      .def_property_readonly("num_reads",
                             [](const FaultPlan& self) { return self.num_attempts(Op::kRead); })
      .def_property_readonly("num_writes",
                             [](const FaultPlan& self) { return self.num_attempts(Op::kWrite); })
      .def_property_readonly("num_injected", &FaultPlan::num_injected);
}

}  // namespace

void bind_storage(py::module_& m) {
  bind_transfer(m);
  bind_fault_plan(m);
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(
          "write",
          [](Engine& self, int fd, uintptr_t data_ptr, int64_t nbytes, int64_t offset) {
            return submit(self, Op::kWrite, fd, data_ptr, nbytes, offset);
          },
          py::arg("fd"), py::arg("data_ptr"), py::arg("nbytes"), py::arg("offset"))
      .def(
          "read",
          [](Engine& self, int fd, uintptr_t data_ptr, int64_t nbytes, int64_t offset) {
            return submit(self, Op::kRead, fd, data_ptr, nbytes, offset);
          },
          py::arg("fd"), py::arg("data_ptr"), py::arg("nbytes"), py::arg("offset"))
      .def("close", &Engine::close, py::arg("cancel") = false,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &Engine::closed)
      .def_property_readonly("name", &Engine::name)
      .def("__enter__", [](std::shared_ptr<Engine> self) { return self; })
      .def("__exit__", [](Engine& self, py::args) {
        py::gil_scoped_release release;
        self.close(/*cancel=*/false);
      });
  m.def("make_threads_engine", make_threads_engine, py::arg("num_threads"), py::arg("faults"));
  m.def("make_uring_engine", make_uring_engine, py::arg("queue_depth"), py::arg("faults"));
  m.def("make_cufile_engine", make_cufile_engine, py::arg("library"), py::arg("num_threads"));
  const auto checksum = [](auto* function) {
    return [function](uintptr_t data_ptr, int64_t nbytes, uint32_t initial) {
      if (nbytes < 0 || (data_ptr == 0 && nbytes > 0)) {
        throw std::invalid_argument("nbytes=" + std::to_string(nbytes) + " at address " +
                                    std::to_string(data_ptr) + " cannot be summed");
      }
      py::gil_scoped_release release;
      return function(reinterpret_cast<const void*>(data_ptr), nbytes, initial);
    };
  };
  m.def("crc32c", checksum(crc32c), py::arg("data_ptr"), py::arg("nbytes"), py::arg("initial") = 0);
  m.def("crc32c_by_table", checksum(crc32c_by_table), py::arg("data_ptr"), py::arg("nbytes"),
        py::arg("initial") = 0);
  m.def("crc32c_in_hardware", crc32c_in_hardware);
  m.def("reserve_file", reserve_file, py::arg("fd"), py::arg("offset"), py::arg("nbytes"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace dataeff
