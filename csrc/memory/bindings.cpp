#include "bindings.h"

namespace py = pybind11;

namespace dataeff {

void bind_memory(py::module_& m) {}

}  // namespace dataeff
