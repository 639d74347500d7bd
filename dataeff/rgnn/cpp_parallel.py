"""Parallel loops for generated C++: the header text, and what it is bound to at load time.

Generated code runs on the OpenMP team that torch already keeps, by calling `GOMP_parallel` of the
libgomp that torch loaded; where torch brings another OpenMP, and in a forked child, it runs on the
core's own pool. The loader sets both addresses, so nothing is linked against OpenMP.

Why not the core's pool everywhere: after each parallel torch operator libgomp's threads spin for
some milliseconds, and a second pool's threads get no core meanwhile. Measured on two cores, a loop
over 2e6 floats in 8 pieces (1.74 ms serial): straight after a `torch.mm` 0.85 ms on torch's team
and 1.67 ms on the pool; an empty loop 3.5 us against 35 us; back to back 1.0 us against 0.2 us.
`-fopenmp` would work too where the compiler's libgomp has the same soname as torch's copy (one
runtime in the process then), but nothing checks that it has, and clang links libomp instead.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from dataeff import _core

PARALLEL_HEADER = """\
// ---- dataeff: parallel loops on torch's OpenMP team, or on the core's pool ----
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace dataeff {

using LoopBody = void (*)(void* context, int64_t begin, int64_t end);
using GompParallel = void (*)(void (*run)(void*), void* data, unsigned num_threads, unsigned);
using PoolParallel = void (*)(int64_t size, int64_t grain, int num_threads, LoopBody, void*);

static GompParallel gomp_parallel = nullptr;  // set by dataeff_bind_parallel
static PoolParallel pool_parallel = nullptr;

struct Loop {
  const int64_t size, grain;
  const LoopBody body;
  void* const context;
  std::atomic<int64_t> next{0};

  static void take_pieces(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    for (;;) {
      const int64_t begin = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
      if (begin >= loop.size) return;
      loop.body(loop.context, begin, std::min(begin + loop.grain, loop.size));
    }
  }
};

// Calls body(begin, end) over disjoint pieces of [0, size), each at most `grain` long, on at most
// `num_threads` threads. `body` must not throw.
template <class Body>
void parallel_for(int64_t size, int64_t grain, int64_t num_threads, const Body& body) {
  if (size <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  num_threads = std::min<int64_t>(num_threads, (size - 1) / grain + 1);
  const LoopBody call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  Loop loop{size, grain, call, const_cast<Body*>(&body)};
  if (num_threads <= 1 || (!gomp_parallel && !pool_parallel)) {
    Loop::take_pieces(&loop);
  } else if (gomp_parallel) {
    gomp_parallel(Loop::take_pieces, &loop, static_cast<unsigned>(num_threads), 0);
  } else {
    pool_parallel(size, grain, static_cast<int>(num_threads), call, loop.context);
  }
}

}  // namespace dataeff

extern "C" __attribute__((visibility("default")))
void dataeff_bind_parallel(void* gomp, void* pool) {
  dataeff::gomp_parallel = reinterpret_cast<dataeff::GompParallel>(gomp);
  dataeff::pool_parallel = reinterpret_cast<dataeff::PoolParallel>(pool);
}
// ---- end of dataeff's parallel loops ----
"""

_bound: list[ctypes.CDLL] = []
_forked = False


def bind(library: ctypes.CDLL) -> None:
    """Gives a library that holds PARALLEL_HEADER its threads; leaves any other as it is."""
    entry = getattr(library, "dataeff_bind_parallel", None)
    if entry is None:
        return
    gomp = None if _forked else torch_gomp_parallel()
    entry(ctypes.c_void_p(gomp), ctypes.c_void_p(_core.parallel_for_address()))
    _bound.append(library)


def torch_gomp_parallel() -> int | None:
    """The address of `GOMP_parallel` in the one libgomp that this process has mapped, if any."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return None
    mapped = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    if len(mapped) != 1:  # none, or two and no way to tell which is torch's
        return None
    library = ctypes.CDLL(mapped.pop())
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value


def _rebind_in_forked_child() -> None:
    # libgomp's team has lost its threads in the child and would wait for them for ever.
    global _forked
    _forked = True
    bound = _bound.copy()
    _bound.clear()
    for library in bound:
        bind(library)


os.register_at_fork(after_in_child=_rebind_in_forked_child)
