// What each room of csrc/ adds to the Python module: one function per room, in its bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace dataeff {

void bind_memory(pybind11::module_& m);
void bind_registration(pybind11::module_& m);
void bind_storage(pybind11::module_& m);
void bind_spill(pybind11::module_& m);
void bind_stored_rows(pybind11::module_& m);
void bind_gather(pybind11::module_& m);
void bind_sampling(pybind11::module_& m);
void bind_parallel(pybind11::module_& m);
void bind_graph(pybind11::module_& m);

}  // namespace dataeff
