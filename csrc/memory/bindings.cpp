#include "bindings.h"

#include <pybind11/stl.h>

#include "memory/alias_capsule.h"
#include "memory/extent_map.h"
#include "memory/host_mapping.h"
#include "memory/huge_pages.h"
#include "memory/idle_blocks.h"
#include "memory/memory_node.h"
#include "memory/same_bytes.h"
#include "memory/slab.h"

namespace py = pybind11;

namespace dataeff {
namespace {

// The handle that Python holds. Buffer exports hold the mapping itself, so that closing the handle
// never pulls memory from under a tensor.
struct HostBuffer {
  std::shared_ptr<HostMapping> mapping;

  const HostMapping& get() const {
    if (!mapping) throw std::invalid_argument("this HostBuffer is closed");
    return *mapping;
  }
};

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  try {
    const auto& buffer = py::cast<HostBuffer&>(py::handle(self));
    const HostMapping& mapping = buffer.get();
    if (PyBuffer_FillInfo(view, self, mapping.data(), mapping.nbytes(), /*readonly=*/0, flags)) {
      return -1;
    }
    view->internal = new std::shared_ptr<HostMapping>(buffer.mapping);
    return 0;
  } catch (const std::exception& e) {
    view->obj = nullptr;
    PyErr_SetString(PyExc_BufferError, e.what());
    return -1;
  }
}

void release_buffer(PyObject*, Py_buffer* view) {
  delete static_cast<std::shared_ptr<HostMapping>*>(view->internal);
}

void set_buffer_slots(PyHeapTypeObject* type) {
  type->as_buffer.bf_getbuffer = get_buffer;
  type->as_buffer.bf_releasebuffer = release_buffer;
  type->ht_type.tp_as_buffer = &type->as_buffer;
}

void bind_idle_blocks(py::module_& m) {
  py::class_<IdleBlocks, std::shared_ptr<IdleBlocks>>(m, "IdleBlocks")
      .def(py::init<int64_t>(), py::arg("kept_nbytes"))
      .def("give", &IdleBlocks::give, py::arg("block"), py::arg("nbytes"))
      .def("take", &IdleBlocks::take, py::arg("least"), py::arg("most"))
      .def("shrink", &IdleBlocks::shrink, py::arg("nbytes"))
      .def_property_readonly("nbytes", &IdleBlocks::nbytes)
      .def_property_readonly("lent_nbytes", &IdleBlocks::lent_nbytes);
  py::class_<Loan>(m, "Loan").def(py::init<std::shared_ptr<IdleBlocks>, py::object, int64_t>(),
                                  py::arg("idle"), py::arg("block"), py::arg("nbytes"));
}

}  // namespace

void bind_memory(py::module_& m) {
  bind_idle_blocks(m);
  py::class_<HostBuffer>(m, "HostBuffer", py::custom_type_setup(set_buffer_slots))
      .def(py::init([](int64_t nbytes, bool shared, std::optional<int> fd, bool inherited) {
             return HostBuffer{fd ? HostMapping::attach(*fd, nbytes)
                                  : HostMapping::create(nbytes, shared, inherited)};
           }),
           py::arg("nbytes"), py::arg("shared") = false, py::kw_only(), py::arg("fd") = py::none(),
           py::arg("inherited") = true)
      .def_property_readonly(
          "data_ptr",
          [](const HostBuffer& self) { return reinterpret_cast<uintptr_t>(self.get().data()); })
      .def_property_readonly("nbytes", [](const HostBuffer& self) { return self.get().nbytes(); })
      .def_property_readonly("capacity_nbytes",
                             [](const HostBuffer& self) { return self.get().capacity(); })
      .def_property_readonly("fd", [](const HostBuffer& self) { return self.get().fd(); })
      .def_property_readonly("closed", [](const HostBuffer& self) { return !self.mapping; })
      .def("close", [](HostBuffer& self) { self.mapping.reset(); });

  py::class_<ExtentMap>(m, "ExtentMap")
      .def(py::init<int64_t, int64_t>(), py::arg("capacity"), py::arg("alignment"))
      .def("allocate", &ExtentMap::allocate, py::arg("nbytes"))
      .def("free", &ExtentMap::free, py::arg("offset"))
      .def("grow", &ExtentMap::grow, py::arg("capacity"))
      .def("rounded", &ExtentMap::rounded, py::arg("nbytes"))
      .def_property_readonly("capacity", &ExtentMap::capacity)
      .def_property_readonly("used", &ExtentMap::used)
      .def_property_readonly("peak", &ExtentMap::peak)
      .def_property_readonly("num_used", &ExtentMap::num_used)
      .def_property_readonly("num_free", &ExtentMap::num_free)
      .def_property_readonly("largest_free", &ExtentMap::largest_free)
      .def_property_readonly("tail_free", &ExtentMap::tail_free);
  py::class_<SlabPart, std::shared_ptr<SlabPart>>(m, "SlabPart")
      .def("release", &SlabPart::release)
      .def_readonly("offset", &SlabPart::offset)
      .def_readonly("nbytes", &SlabPart::nbytes)
      .def_property_readonly("data_ptr", [](const SlabPart& self) {
        return reinterpret_cast<uintptr_t>(self.data());
      });
  py::class_<Slab, std::shared_ptr<Slab>>(m, "Slab")
      .def(py::init([](const HostBuffer& buffer) {
             buffer.get();  // not closed
             return std::make_shared<Slab>(buffer.mapping);
           }),
           py::arg("buffer"))
      .def("take", &Slab::take, py::arg("nbytes"))
      .def(
          "lend",
          [](Slab& self, int64_t nbytes) -> py::object {
            constexpr int kCpu = 1;  // DLPack's number
            const std::shared_ptr<SlabPart> part = self.take(nbytes);
            if (!part) return py::none();
            return alias_capsule(reinterpret_cast<uintptr_t>(part->data()), nbytes, kCpu, 0,
                                 py::cast(part));
          },
          py::arg("nbytes"))
      .def_property_readonly("used", &Slab::used)
      .def_property_readonly("peak", &Slab::peak)
      .def_property_readonly("largest_free", &Slab::largest_free)
      .def_property_readonly("capacity", &Slab::capacity);
  m.def("alias_capsule", &alias_capsule, py::arg("data"), py::arg("nbytes"), py::arg("device_type"),
        py::arg("device_id"), py::arg("owner"));
  m.def(
      "move_into_huge_pages",
      [](uintptr_t data, int64_t nbytes, int num_threads) {
        py::gil_scoped_release nogil;
        return move_into_huge_pages(reinterpret_cast<void*>(data), nbytes, num_threads);
      },
      py::arg("data"), py::arg("nbytes"), py::arg("num_threads"));
  m.def(
      "prefer_huge_pages",
      [](uintptr_t data, int64_t nbytes) {
        prefer_huge_pages(reinterpret_cast<void*>(data), nbytes);
      },
      py::arg("data"), py::arg("nbytes"));
  m.def(
      "prefer_node",
      [](uintptr_t data, int64_t nbytes, int node) {
        return prefer_node(reinterpret_cast<void*>(data), nbytes, node);
      },
      py::arg("data"), py::arg("nbytes"), py::arg("node"));
  m.def(
      "copy_bytes",
      [](uintptr_t parts, int64_t num_parts, int num_threads) {
        copy_bytes(reinterpret_cast<const CopiedBytes*>(parts), num_parts, num_threads);
      },
      py::arg("parts"), py::arg("num_parts"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "same_bytes",
      [](uintptr_t parts, int64_t num_parts, int num_threads) {
        return same_bytes(reinterpret_cast<const CopiedBytes*>(parts), num_parts, num_threads);
      },
      py::arg("parts"), py::arg("num_parts"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace dataeff
