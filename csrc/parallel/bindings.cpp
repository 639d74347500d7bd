#include "bindings.h"

#include "parallel/parallel_for_c.h"

namespace dataeff {

void bind_parallel(pybind11::module_& m) {
  m.def(
      "parallel_for_address", [] { return reinterpret_cast<uintptr_t>(&dataeff_parallel_for); },
      "The address of dataeff_parallel_for, for code compiled at run time.");
}

}  // namespace dataeff
