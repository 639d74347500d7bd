#include "bindings.h"

#include "parallel/parallel_for.h"
#include "parallel/parallel_for_c.h"

namespace dataeff {

void bind_parallel(pybind11::module_& m) {
  m.def(
      "parallel_for_address", [] { return reinterpret_cast<uintptr_t>(&dataeff_parallel_for); },
      "The address of dataeff_parallel_for, for code compiled at run time.");
  m.def(
      "use_openmp_team",
      [](uintptr_t parallel) { use_openmp_team(reinterpret_cast<OpenMpParallel>(parallel)); },
      pybind11::arg("gomp_parallel"),
      "The address of GOMP_parallel in the libgomp whose threads loops of the main thread run on.");
  m.def("loop_threads_here", &loop_threads_here,
        "Threads that the calling thread's loops run on, 0 where it was not told.");
  m.def("set_loop_threads_here", &set_loop_threads_here, pybind11::arg("num_threads"));
}

}  // namespace dataeff
