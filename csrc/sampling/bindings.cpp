#include "bindings.h"

namespace py = pybind11;

namespace dataeff {

void bind_sampling(py::module_& m) {}

}  // namespace dataeff
