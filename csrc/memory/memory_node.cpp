#include "memory/memory_node.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace dataeff {

bool prefer_node(void* data, int64_t nbytes, int node) {
  constexpr int kMostNodes = 1024;  // as many as Linux can be built for
  constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;
  if (node < 0 || node >= kMostNodes) return false;
  unsigned long nodes[kMostNodes / kBits] = {};
  nodes[node / kBits] = 1UL << (node % kBits);
  // The kernel reads one bit less than it is told of.
  return syscall(SYS_mbind, data, nbytes, MPOL_PREFERRED, nodes, kMostNodes + 1UL, 0U) == 0;
}

}  // namespace dataeff
