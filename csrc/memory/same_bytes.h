// Copies of memory in many pieces, and whether they still hold what they are copies of.
#pragma once

#include <cstdint>

namespace dataeff {

// Memory and its copy, as addresses: a row of three 64-bit integers from Python.
struct CopiedBytes {
  int64_t original;
  int64_t copy;
  int64_t nbytes;
};

void copy_bytes(const CopiedBytes* parts, int64_t num_parts, int num_threads);

// Ends early where bytes differ.
bool same_bytes(const CopiedBytes* parts, int64_t num_parts, int num_threads);

}  // namespace dataeff
