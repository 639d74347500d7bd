#include "bindings.h"

namespace py = pybind11;

namespace dataeff {

void bind_storage(py::module_& m) {}

}  // namespace dataeff
