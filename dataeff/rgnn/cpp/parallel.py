"""Parallel loops for generated C++: the header text, and what it is bound to at load time.

Generated code runs its loops through the core's `parallel_for`, which uses the OpenMP team that
torch keeps (see `dataeff._threads`). The loader sets the address, so nothing is linked.
"""

from __future__ import annotations

import ctypes

from dataeff import _core
from dataeff._threads import share_torch_threads

PARALLEL_HEADER = """\
// ---- dataeff: parallel loops of the core ----
#include <stdint.h>

namespace dataeff {

using LoopBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t size, int64_t grain, int num_threads, LoopBody, void*);

static ParallelFor core_parallel_for = nullptr;  // set by dataeff_bind_parallel

// Calls body(begin, end) over disjoint pieces of [0, size), each at most `grain` long, on at most
// `num_threads` threads. `body` must not throw.
template <class Body>
void parallel_for(int64_t size, int64_t grain, int64_t num_threads, const Body& body) {
  if (grain < 1) grain = 1;
  const LoopBody call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  if (core_parallel_for && num_threads > 1) {
    core_parallel_for(size, grain, static_cast<int>(num_threads), call, const_cast<Body*>(&body));
    return;
  }
  for (int64_t begin = 0; begin < size; begin += grain) {
    body(begin, size - begin < grain ? size : begin + grain);
  }
}

}  // namespace dataeff

extern "C" __attribute__((visibility("default")))
void dataeff_bind_parallel(void* parallel_for) {
  dataeff::core_parallel_for = reinterpret_cast<dataeff::ParallelFor>(parallel_for);
}
// ---- end of dataeff's parallel loops ----
"""


def bind(library: ctypes.CDLL) -> None:
    """Gives a library that holds PARALLEL_HEADER its threads; leaves any other as it is."""
    entry = getattr(library, "dataeff_bind_parallel", None)
    if entry is not None:
        share_torch_threads()
        entry(ctypes.c_void_p(_core.parallel_for_address()))
