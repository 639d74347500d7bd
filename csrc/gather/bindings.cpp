#include "bindings.h"

#include "gather/gather.h"

namespace py = pybind11;

namespace dataeff {
namespace {

RowTable row_table(uintptr_t data, int64_t num_rows, int64_t row_nbytes, int64_t row_stride) {
  return {reinterpret_cast<std::byte*>(data), num_rows, row_nbytes, row_stride};
}

RowIndex row_index(uintptr_t data, int64_t size, int itemsize) {
  return {reinterpret_cast<const void*>(data), size, itemsize};
}

}  // namespace

void bind_gather(py::module_& m) {
  m.def(
      "gather_cpu",
      [](uintptr_t table, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, uintptr_t index,
         int64_t index_size, int index_itemsize, uintptr_t out, int num_threads) {
        py::gil_scoped_release nogil;
        gather_cpu(row_table(table, num_rows, row_nbytes, row_stride),
                   row_index(index, index_size, index_itemsize), reinterpret_cast<std::byte*>(out),
                   num_threads);
      },
      py::arg("table"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("index"), py::arg("index_size"), py::arg("index_itemsize"), py::arg("out"),
      py::arg("num_threads"));
  m.def(
      "scatter_cpu",
      [](uintptr_t table, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, uintptr_t index,
         int64_t index_size, int index_itemsize, uintptr_t rows, int num_threads) {
        py::gil_scoped_release nogil;
        scatter_cpu(row_table(table, num_rows, row_nbytes, row_stride),
                    row_index(index, index_size, index_itemsize),
                    reinterpret_cast<const std::byte*>(rows), num_threads);
      },
      py::arg("table"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("index"), py::arg("index_size"), py::arg("index_itemsize"), py::arg("rows"),
      py::arg("num_threads"));
  m.def(
      "gather_cuda",
      [](uintptr_t table, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, uintptr_t index,
         int64_t index_size, int index_itemsize, uintptr_t out, uintptr_t bad_count,
         uintptr_t bad_seen, int device, uintptr_t stream, int num_blocks) {
        const BadIndexReport report{reinterpret_cast<int64_t*>(bad_count),
                                    reinterpret_cast<int64_t*>(bad_seen)};
        py::gil_scoped_release nogil;
        gather_cuda(row_table(table, num_rows, row_nbytes, row_stride),
                    row_index(index, index_size, index_itemsize), reinterpret_cast<std::byte*>(out),
                    report, device, stream, num_blocks);
      },
      py::arg("table"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("index"), py::arg("index_size"), py::arg("index_itemsize"), py::arg("out"),
      py::arg("bad_count"), py::arg("bad_seen"), py::arg("device"), py::arg("stream"),
      py::arg("num_blocks") = 0);
}

}  // namespace dataeff
