#include "bindings.h"

namespace py = pybind11;

namespace dataeff {

void bind_gather(py::module_& m) {}

}  // namespace dataeff
