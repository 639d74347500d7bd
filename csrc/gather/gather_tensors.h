// The gather on the host called with tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace dataeff {

// Adds to `m`:
//
// gather_tensors(table, index, out, tally): out[i] = table[index[i]] where all are plain: tensors
// in host memory, the index and the rows contiguous, every index in range, the result new (`out` is
// None) and less than 4 MiB, or `out` of its shape and dtype and apart from the others. Returns the
// rows, or None, with nothing done, for whatever is not plain: the caller goes the long way, which
// knows what is wrong. `tally` is 0 or the address of three int64, to which one call, its rows and
// their bytes are added.
//
// gather_stored_tensors(table, scales, index, out, like, format, element, tally): the same of rows
// kept small, which are widened into `out`, whose dtype is that of `element`, or into what is made
// like `like`; `tally` is not 0.
void bind_gather_tensors(pybind11::module_& m);

}  // namespace dataeff
