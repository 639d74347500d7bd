#include "bindings.h"

#include <pybind11/stl.h>

#include "gather/gather.h"
#include "gather/gather_tensors.h"
#include "gather/plain_tensors.h"
#include "gather/request_count.h"
#include "gather/stored_rows.h"
#include "gather/sum_rows.h"
#include "gather/sum_rows_tensors.h"

namespace py = pybind11;

namespace dataeff {
namespace {

RowTable row_table(uintptr_t data, int64_t num_rows, int64_t row_nbytes, int64_t row_stride) {
  return {reinterpret_cast<std::byte*>(data), num_rows, row_nbytes, row_stride};
}

RowIndex row_index(uintptr_t data, int64_t size, int itemsize) {
  return {reinterpret_cast<const void*>(data), size, itemsize};
}

RowCoding row_coding(int format, int element, uintptr_t scales) {
  return {static_cast<RowFormat>(format), static_cast<Element>(element),
          reinterpret_cast<const float*>(scales)};
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
      "gather_decoded_cpu",
      [](uintptr_t table, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, uintptr_t index,
         int64_t index_size, int index_itemsize, uintptr_t out, int num_threads, int format,
         int element, uintptr_t scales) {
        py::gil_scoped_release nogil;
        gather_decoded_cpu(row_table(table, num_rows, row_nbytes, row_stride),
                           row_coding(format, element, scales),
                           row_index(index, index_size, index_itemsize),
                           reinterpret_cast<std::byte*>(out), num_threads);
      },
      py::arg("table"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("index"), py::arg("index_size"), py::arg("index_itemsize"), py::arg("out"),
      py::arg("num_threads"), py::arg("format"), py::arg("element"), py::arg("scales"));
  m.def(
      "encode_rows",
      [](uintptr_t source, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, int element,
         int format, uintptr_t codes, uintptr_t scales, int num_threads) {
        py::gil_scoped_release nogil;
        encode_rows(row_table(source, num_rows, row_nbytes, row_stride),
                    static_cast<Element>(element), static_cast<RowFormat>(format),
                    reinterpret_cast<std::byte*>(codes), reinterpret_cast<float*>(scales),
                    num_threads);
      },
      py::arg("source"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("element"), py::arg("format"), py::arg("codes"), py::arg("scales"),
      py::arg("num_threads"));
  m.def(
      "count_requests",
      [](uintptr_t table, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, uintptr_t index,
         int64_t index_size, int index_itemsize) {
        py::gil_scoped_release nogil;
        const RequestCount count =
            count_requests(row_table(table, num_rows, row_nbytes, row_stride),
                           row_index(index, index_size, index_itemsize));
        return std::pair(count.shifted, count.plain);
      },
      py::arg("table"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("index"), py::arg("index_size"), py::arg("index_itemsize"));
  m.def(
      "gather_cuda",
      [](uintptr_t table, int64_t num_rows, int64_t row_nbytes, int64_t row_stride, uintptr_t index,
         int64_t index_size, int index_itemsize, uintptr_t out, uintptr_t bad_count,
         uintptr_t bad_seen, int device, uintptr_t stream, int num_blocks, uintptr_t places,
         uintptr_t hot, int64_t hot_rows, int64_t hot_stride, uintptr_t hot_slots,
         uintptr_t hot_hits, int format, int element, uintptr_t scales) {
        const BadIndexReport report{reinterpret_cast<int64_t*>(bad_count),
                                    reinterpret_cast<int64_t*>(bad_seen)};
        const RowCoding coding = row_coding(format, element, scales);
        const GatherOptions options{
            .hot = {reinterpret_cast<const std::byte*>(hot), hot_rows, hot_stride,
                    reinterpret_cast<const int32_t*>(hot_slots),
                    reinterpret_cast<int64_t*>(hot_hits)},
            .places = reinterpret_cast<const int64_t*>(places),
            .coding = format < 0 ? nullptr : &coding,
            .num_blocks = num_blocks,
        };
        py::gil_scoped_release nogil;
        gather_cuda(row_table(table, num_rows, row_nbytes, row_stride),
                    row_index(index, index_size, index_itemsize), reinterpret_cast<std::byte*>(out),
                    report, device, stream, options);
      },
      py::arg("table"), py::arg("num_rows"), py::arg("row_nbytes"), py::arg("row_stride"),
      py::arg("index"), py::arg("index_size"), py::arg("index_itemsize"), py::arg("out"),
      py::arg("bad_count"), py::arg("bad_seen"), py::arg("device"), py::arg("stream"),
      py::arg("num_blocks") = 0, py::arg("places") = 0, py::arg("hot") = 0, py::arg("hot_rows") = 0,
      py::arg("hot_stride") = 0, py::arg("hot_slots") = 0, py::arg("hot_hits") = 0,
      py::arg("format") = -1, py::arg("element") = 0, py::arg("scales") = 0);
  m.def(
      "strictly_ascending",
      [](uintptr_t ids, int64_t size) {
        return strictly_ascending(reinterpret_cast<const int64_t*>(ids), size);
      },
      py::arg("ids"), py::arg("size"));
  bind_plain_tensors(m);
  bind_gather_tensors(m);
  bind_sum_rows_tensors(m);
}

}  // namespace dataeff
