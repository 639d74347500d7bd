// A loop over disjoint pieces, run by the calling thread and a few pooled ones.
#pragma once

#include <cstdint>
#include <functional>

namespace dataeff {

// Calls body(begin, end) over disjoint pieces of [0, size), each at most `grain` long, on at most
// `num_threads` threads, the caller among them. Returns when every piece is done; the first
// exception that a piece throws is rethrown here and the pieces not yet begun are skipped.
//
// Threads start at the first call that needs them and are kept. Several threads may call at once,
// a body may call again, and a forked child starts with a pool of its own.
void parallel_for(int64_t size, int64_t grain, int num_threads,
                  const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace dataeff
