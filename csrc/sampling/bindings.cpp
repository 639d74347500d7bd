#include "bindings.h"

#include <pybind11/stl.h>

#include <string>

#include "sampling/csc.h"
#include "sampling/frontier.h"
#include "sampling/neighbor_sampler.h"

namespace py = pybind11;

namespace dataeff {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls body with a null pointer of the id type that is `nbytes` wide.
template <typename Body>
auto with_id(int nbytes, const Body& body) {
  if (nbytes == 4) return body(static_cast<int32_t*>(nullptr));
  if (nbytes == 8) return body(static_cast<int64_t*>(nullptr));
  throw std::invalid_argument("ids are 4 or 8 bytes wide, not " + std::to_string(nbytes));
}

bool bind_build_csc(int id_nbytes, uintptr_t src, uintptr_t dst, int64_t num_edges,
                    int64_t num_src_nodes, int64_t num_dst_nodes, uintptr_t order, uintptr_t colptr,
                    uintptr_t row, uintptr_t e_id) {
  return with_id(id_nbytes, [&](auto* id) {
    using Id = std::remove_pointer_t<decltype(id)>;
    return build_csc<Id>(
        {pointer<const Id>(src), pointer<const Id>(dst), num_edges, num_src_nodes, num_dst_nodes},
        pointer<const int64_t>(order), pointer<Id>(colptr), pointer<Id>(row), pointer<Id>(e_id));
  });
}

void bind_check_csc(int id_nbytes, uintptr_t colptr, int64_t num_dst_nodes, uintptr_t row,
                    int64_t num_edges, int64_t num_src_nodes) {
  with_id(id_nbytes, [&](auto* id) {
    using Id = std::remove_pointer_t<decltype(id)>;
    check_csc<Id>(pointer<const Id>(colptr), num_dst_nodes, pointer<const Id>(row), num_edges,
                  num_src_nodes);
  });
}

bool bind_sorted_in_columns(int id_nbytes, uintptr_t colptr, int64_t num_dst_nodes,
                            int value_nbytes, uintptr_t value) {
  return with_id(id_nbytes, [&](auto* id) {
    return with_id(value_nbytes, [&](auto* kind) {
      using Id = std::remove_pointer_t<decltype(id)>;
      using Value = std::remove_pointer_t<decltype(kind)>;
      return sorted_in_columns(pointer<const Id>(colptr), num_dst_nodes,
                               pointer<const Value>(value));
    });
  });
}

RelationSpec make_relation(int src_type, int dst_type, uintptr_t colptr, uintptr_t row,
                           uintptr_t e_id, uintptr_t etype, uintptr_t weight, uintptr_t time,
                           std::vector<std::vector<int64_t>> fanouts) {
  return {src_type,
          dst_type,
          pointer<const void>(colptr),
          pointer<const void>(row),
          pointer<const void>(e_id),
          pointer<const int32_t>(etype),
          pointer<const double>(weight),
          pointer<const int64_t>(time),
          std::move(fanouts)};
}

Frontier make_frontier(uintptr_t colptr, int id_nbytes, uintptr_t node, uintptr_t tree,
                       uintptr_t until, int64_t size, uintptr_t etype, uintptr_t weight,
                       uintptr_t time, uintptr_t fanouts, int64_t num_fanouts, bool replace,
                       bool last, uint64_t random_seed, int hop, int relation) {
  return {
      pointer<const void>(colptr),
      id_nbytes,
      pointer<const int64_t>(node),
      pointer<const int64_t>(tree),
      pointer<const int64_t>(until),
      size,
      {pointer<const int32_t>(etype), pointer<const double>(weight), pointer<const int64_t>(time),
       pointer<const int64_t>(fanouts), num_fanouts, replace, last},
      random_seed,
      hop,
      relation};
}

std::unique_ptr<Sample> bind_sample(
    NeighborSampler& sampler, const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>& seeds,
    uint64_t random_seed, int num_threads) {
  std::vector<Seeds> by_type;
  for (const auto& [id, time, size] : seeds) {
    by_type.push_back({pointer<const int64_t>(id), pointer<const int64_t>(time), size});
  }
  return sampler.sample(by_type, random_seed, num_threads);
}

}  // namespace

void bind_sampling(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("build_csc", &bind_build_csc, no_gil, py::arg("id_nbytes"), py::arg("src"), py::arg("dst"),
        py::arg("num_edges"), py::arg("num_src_nodes"), py::arg("num_dst_nodes"), py::arg("order"),
        py::arg("colptr"), py::arg("row"), py::arg("e_id"));
  m.def("check_csc", &bind_check_csc, no_gil, py::arg("id_nbytes"), py::arg("colptr"),
        py::arg("num_dst_nodes"), py::arg("row"), py::arg("num_edges"), py::arg("num_src_nodes"));
  m.def("sorted_in_columns", &bind_sorted_in_columns, no_gil, py::arg("id_nbytes"),
        py::arg("colptr"), py::arg("num_dst_nodes"), py::arg("value_nbytes"), py::arg("value"));

  py::class_<RelationSpec>(m, "RelationSpec")
      .def(py::init(&make_relation), py::kw_only(), py::arg("src_type"), py::arg("dst_type"),
           py::arg("colptr"), py::arg("row"), py::arg("e_id"), py::arg("etype"), py::arg("weight"),
           py::arg("time"), py::arg("fanouts"));
  py::class_<Sample>(m, "Sample")
      .def("nodes_per_hop", &Sample::nodes_per_hop)
      .def("edges_per_hop", &Sample::edges_per_hop)
      .def(
          "write_nodes",
          [](const Sample& sample, int type, uintptr_t id, uintptr_t tree, int num_threads) {
            sample.write_nodes(type, pointer<int64_t>(id), pointer<int64_t>(tree), num_threads);
          },
          no_gil, py::arg("type"), py::arg("id"), py::arg("tree"), py::arg("num_threads"))
      .def(
          "write_edges",
          [](const Sample& sample, int relation, uintptr_t src, uintptr_t dst, uintptr_t e_id,
             uintptr_t etype, int num_threads) {
            sample.write_edges(relation, pointer<int64_t>(src), pointer<int64_t>(dst),
                               pointer<int64_t>(e_id), pointer<int64_t>(etype), num_threads);
          },
          no_gil, py::arg("relation"), py::arg("src"), py::arg("dst"), py::arg("e_id"),
          py::arg("etype"), py::arg("num_threads"));
  py::class_<NeighborSampler, std::shared_ptr<NeighborSampler>>(m, "NeighborSampler")
      .def(py::init([](int id_nbytes, std::vector<int64_t> num_nodes,
                       std::vector<RelationSpec> relations, int num_hops, bool replace,
                       bool disjoint, bool last, bool induced) {
             return NeighborSampler::make({id_nbytes, std::move(num_nodes), std::move(relations),
                                           num_hops, replace, disjoint, last, induced});
           }),
           py::kw_only(), py::arg("id_nbytes"), py::arg("num_nodes"), py::arg("relations"),
           py::arg("num_hops"), py::arg("replace"), py::arg("disjoint"), py::arg("last"),
           py::arg("induced"))
      .def("sample", &bind_sample, no_gil, py::arg("seeds"), py::arg("random_seed"),
           py::arg("num_threads"));

  py::class_<Frontier>(m, "Frontier")
      .def(py::init(&make_frontier), py::kw_only(), py::arg("colptr"), py::arg("id_nbytes"),
           py::arg("node"), py::arg("tree"), py::arg("until"), py::arg("size"), py::arg("etype"),
           py::arg("weight"), py::arg("time"), py::arg("fanouts"), py::arg("num_fanouts"),
           py::arg("replace"), py::arg("last"), py::arg("random_seed"), py::arg("hop"),
           py::arg("relation"))
      .def(
          "count",
          [](const Frontier& self, uintptr_t counts) {
            count_frontier(self, pointer<int64_t>(counts));
          },
          no_gil, py::arg("counts"))
      .def(
          "choose",
          [](const Frontier& self, uintptr_t ends, uintptr_t places) {
            choose_frontier(self, pointer<const int64_t>(ends), pointer<int64_t>(places));
          },
          no_gil, py::arg("ends"), py::arg("places"))
      .def(
          "count_cuda",
          [](const Frontier& self, uintptr_t counts, int device, uintptr_t stream) {
            count_frontier_cuda(self, pointer<int64_t>(counts), device, stream);
          },
          no_gil, py::arg("counts"), py::arg("device"), py::arg("stream"))
      .def(
          "choose_cuda",
          [](const Frontier& self, uintptr_t ends, uintptr_t places, int device, uintptr_t stream) {
            choose_frontier_cuda(self, pointer<const int64_t>(ends), pointer<int64_t>(places),
                                 device, stream);
          },
          no_gil, py::arg("ends"), py::arg("places"), py::arg("device"), py::arg("stream"));
}

}  // namespace dataeff
