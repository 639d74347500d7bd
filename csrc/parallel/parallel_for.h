// A loop over disjoint pieces, run by the calling thread and a few pooled ones.
#pragma once

#include <cstdint>
#include <functional>

namespace dataeff {

// Calls body(begin, end) over disjoint pieces of [0, size), each at most `grain` long, on at most
// `num_threads` threads, the caller among them. Returns when every piece is done; the first
// exception that a piece throws is rethrown here and the pieces not yet begun are skipped.
//
// The threads are those of the OpenMP team where there is one and the caller is the main thread,
// and otherwise a pool of ours: it starts at the first call that needs it and is kept. Several
// threads may call at once, a body may call again, and a forked child starts with a pool of its
// own.
void parallel_for(int64_t size, int64_t grain, int num_threads,
                  const std::function<void(int64_t begin, int64_t end)>& body);

// The `GOMP_parallel` of the libgomp whose threads serve the main thread from now on: run(data) is
// called on up to `num_threads` of them. A forked child forgets it: its team has lost its threads.
//
// Why: after each parallel operator of torch its OpenMP threads spin for some milliseconds, and a
// second pool's threads get no core meanwhile. Other threads would each start a team of their own.
using OpenMpParallel = void (*)(void (*run)(void*), void* data, unsigned num_threads,
                                unsigned flags);
void use_openmp_team(OpenMpParallel parallel);

// Threads that the calling thread's loops run on; 0 where it was not told: as many as torch has.
int loop_threads_here();
void set_loop_threads_here(int num_threads);

}  // namespace dataeff
