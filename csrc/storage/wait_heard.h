// Waiting on behalf of Python: the GIL is released, and Ctrl-C is heard.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "storage/transfer.h"

namespace dataeff {

// Waits in slices until `waited` is done. `under_way()` is a transfer that is waited for, for
// messages. Raises TimeoutError, what a signal handler raises, and RuntimeError in a forked child.
template <typename Waited, typename UnderWay>
void wait_heard(Waited& waited, std::optional<double> timeout_s, const UnderWay& under_way) {
  namespace py = pybind11;
  using std::chrono::nanoseconds;
  constexpr double kSlice_s = 0.1;
  double left_s = timeout_s.value_or(INFINITY);
  while (!waited.wait_for(nanoseconds{0})) {
    const Transfer& transfer = under_way();
    if (!transfer.of_this_process()) {
      throw std::runtime_error(transfer.describe() +
                               " was begun before a fork and ends only in the parent");
    }
    const double slice_s = std::clamp(left_s, 0.0, kSlice_s);
    bool done;
    {
      py::gil_scoped_release release;
      done = waited.wait_for(nanoseconds{static_cast<int64_t>(slice_s * 1e9)});
    }
    if (done) break;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    left_s -= slice_s;
    if (left_s <= 0) {
      PyErr_SetString(PyExc_TimeoutError, (transfer.describe() + " is not done yet").c_str());
      throw py::error_already_set();
    }
  }
}

}  // namespace dataeff
