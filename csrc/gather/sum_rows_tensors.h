// The sums of a gather's gradient called with tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace dataeff {

// Adds to `m`:
//
// sum_rows_tensors(index, rows, num_rows, padding, new): the rows of equal numbers in `index`
// summed where all are plain: tensors in host memory, contiguous, `rows` [*index.shape, ...] of
// float32 or float64, every index in [-num_rows, num_rows), of less than 2^32 rows; those of row
// `padding`, if it is not negative, are left out. `new(n)` gives the tensors for the result: int64
// [1, n] at any stride, and [n, ...] of the dtype of `rows`. Returns what `new` gave, filled: the
// different rows, ascending, and their sums; or None for whatever is not plain.
void bind_sum_rows_tensors(pybind11::module_& m);

}  // namespace dataeff
