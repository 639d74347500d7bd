#include "bindings.h"

#include "graph/counting_sort.h"
#include "graph/merge_edges.h"
#include "graph/runs.h"

namespace py = pybind11;

namespace dataeff {
namespace {

template <class Index>
Index* at(uintptr_t address) {
  return reinterpret_cast<Index*>(address);
}

// Calls work(Index{}) for int32_t or int64_t.
template <class Work>
auto by_itemsize(int itemsize, const Work& work) {
  py::gil_scoped_release nogil;
  return itemsize == 4 ? work(int32_t{}) : work(int64_t{});
}

}  // namespace

void bind_graph(py::module_& m) {
  m.def(
      "counting_sort",
      [](int itemsize, uintptr_t key, uintptr_t first, int64_t num_rows, int64_t num_keys,
         uintptr_t order, uintptr_t rank, uintptr_t ptr, int num_threads) {
        by_itemsize(itemsize, [&](auto zero) {
          using Index = decltype(zero);
          counting_sort(at<const Index>(key), at<const Index>(first), num_rows, num_keys,
                        at<Index>(order), at<Index>(rank), at<Index>(ptr), num_threads);
        });
      },
      py::arg("itemsize"), py::arg("key"), py::arg("first"), py::arg("num_rows"),
      py::arg("num_keys"), py::arg("order"), py::arg("rank"), py::arg("ptr"),
      py::arg("num_threads"));
  m.def(
      "count_runs",
      [](int itemsize, uintptr_t a, uintptr_t b, int64_t num_rows, int num_threads) {
        return by_itemsize(itemsize, [&](auto zero) {
          using Index = decltype(zero);
          return count_runs(at<const Index>(a), at<const Index>(b), num_rows, num_threads);
        });
      },
      py::arg("itemsize"), py::arg("a"), py::arg("b"), py::arg("num_rows"), py::arg("num_threads"));
  m.def(
      "merge_edges",
      [](uintptr_t parts, int64_t num_parts, int itemsize, uintptr_t src, uintptr_t dst,
         uintptr_t type, int num_threads) {
        return by_itemsize(itemsize, [&](auto zero) {
          using Index = decltype(zero);
          return merge_edges(at<const EdgePart>(parts), num_parts, at<Index>(src), at<Index>(dst),
                             at<Index>(type), num_threads);
        });
      },
      py::arg("parts"), py::arg("num_parts"), py::arg("itemsize"), py::arg("src"), py::arg("dst"),
      py::arg("type"), py::arg("num_threads"));
  m.def(
      "number_runs",
      [](int itemsize, uintptr_t a, uintptr_t b, uintptr_t order, int64_t num_rows,
         uintptr_t run_of, uintptr_t ptr, uintptr_t run_a, uintptr_t run_b, int num_threads) {
        by_itemsize(itemsize, [&](auto zero) {
          using Index = decltype(zero);
          number_runs(at<const Index>(a), at<const Index>(b), at<const Index>(order), num_rows,
                      at<Index>(run_of), at<Index>(ptr), at<Index>(run_a), at<Index>(run_b),
                      num_threads);
        });
      },
      py::arg("itemsize"), py::arg("a"), py::arg("b"), py::arg("order"), py::arg("num_rows"),
      py::arg("run_of"), py::arg("ptr"), py::arg("run_a"), py::arg("run_b"),
      py::arg("num_threads"));
}

}  // namespace dataeff
