// Which NUMA node's memory backs a range of addresses.
#pragma once

#include <cstdint>

namespace dataeff {

// Asks for pages of NUMA node `node` under [data, data + nbytes), whole pages both; another node's
// serve when it has none left. Call it before the memory is first written: pages that exist already
// stay where they are. A wish: returns whether the kernel took it (containers may forbid it).
bool prefer_node(void* data, int64_t nbytes, int node);

}  // namespace dataeff
