// How many requests the CUDA gather puts on the bus, found by running its index arithmetic on the
// host: the number that decides its speed, known without a GPU.
#pragma once

#include "gather/gather.h"

namespace dataeff {

struct RequestCount {
  int64_t shifted;  // of the gather: distinct 128-byte lines, load by load
  int64_t plain;    // of a warp a row that reads from its first byte on, 32 equal units a load
};

// `index` must be within the table; no memory of the table is read.
RequestCount count_requests(const RowTable& table, const RowIndex& index);

}  // namespace dataeff
