#include <pybind11/stl.h>
#include <sys/stat.h>

#include "bindings.h"
#include "errors.h"
#include "storage/row_cache.h"
#include "storage/row_layout.h"
#include "storage/row_reader.h"
#include "storage/row_runs.h"

namespace py = pybind11;

namespace dataeff {
namespace {

// num_rows, rows_per_extent, offset, fds
using SegmentTuple = std::tuple<int64_t, int64_t, int64_t, std::vector<int>>;

RowLayout make_layout(const std::vector<SegmentTuple>& tuples, int64_t row_nbytes) {
  std::vector<RowSegment> segments;
  for (const auto& [num_rows, rows_per_extent, offset, fds] : tuples) {
    RowSegment segment{num_rows, rows_per_extent, offset, {}};
    for (const int fd : fds) {
      struct stat status{};
      if (fstat(fd, &status) != 0) throw OsError(errno, "fd " + std::to_string(fd));
      segment.files.push_back({fd, status.st_size});
    }
    segments.push_back(std::move(segment));
  }
  return {std::move(segments), row_nbytes};
}

// Lets Ctrl-C through: runs Python's signal handlers, and throws what they raise.
void hear_signals() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::list plan_runs(const std::vector<SegmentTuple>& segments, int64_t row_nbytes,
                   const std::vector<int64_t>& rows, int64_t max_run_nbytes) {
  const RowLayout layout = make_layout(segments, row_nbytes);
  std::vector<WantedRow> wanted;
  for (size_t i = 0; i < rows.size(); ++i) {
    wanted.push_back({layout.place(rows[i]), static_cast<int64_t>(i)});
  }
  RowRuns runs(std::move(wanted), row_nbytes, max_run_nbytes);
  py::list found;
  for (RowRun run; runs.next(run);) {
    found.append(py::make_tuple(run.file, run.begin, run.nbytes, run.last - run.first));
  }
  return found;
}

}  // namespace

void bind_stored_rows(py::module_& m) {
  py::class_<RowReader>(m, "RowReader")
      .def(py::init([](const std::vector<SegmentTuple>& segments, int64_t row_nbytes,
                       int queue_depth, int64_t cache_nbytes, std::shared_ptr<Engine> engine,
                       std::shared_ptr<FaultPlan> faults) {
             return std::make_unique<RowReader>(make_layout(segments, row_nbytes), queue_depth,
                                                cache_nbytes, std::move(engine), std::move(faults));
           }),
           py::arg("segments"), py::arg("row_nbytes"), py::arg("queue_depth"),
           py::arg("cache_nbytes"), py::arg("engine"), py::arg("faults"))
      .def(
          "gather",
          [](RowReader& self, uintptr_t index, int64_t size, int itemsize, uintptr_t out,
             int num_threads) {
            return self.gather({reinterpret_cast<const void*>(index), size, itemsize},
                               reinterpret_cast<std::byte*>(out), num_threads, hear_signals);
          },
          py::arg("index"), py::arg("size"), py::arg("itemsize"), py::arg("out"),
          py::arg("num_threads"), py::call_guard<py::gil_scoped_release>())
      .def("counts",
           [](const RowReader& self) {
             const RowReader::Counts counts = self.counts();
             return py::make_tuple(counts.num_hits, counts.num_misses, counts.num_reads,
                                   counts.nbytes_read);
           })
      .def_property_readonly("num_cache_rows", &RowReader::num_cache_rows)
      .def_property_readonly("queue_depth", &RowReader::queue_depth);
  m.def("plan_runs", plan_runs, py::arg("segments"), py::arg("row_nbytes"), py::arg("rows"),
        py::arg("max_run_nbytes"));
  py::class_<RowCache>(m, "RowCache")
      .def(py::init([](int64_t budget_nbytes, int64_t row_nbytes, int64_t num_rows) {
             return RowCache::create(budget_nbytes, row_nbytes, num_rows);
           }),
           py::arg("budget_nbytes"), py::arg("row_nbytes"), py::arg("num_rows"))
      .def("find",
           [](RowCache& self, int64_t row, int64_t nbytes) -> py::object {
             const char* data = self.find(row);
             return data ? py::object(py::bytes(data, nbytes)) : py::object(py::none());
           })
      .def("insert", [](RowCache& self, int64_t row,
                        const std::string& data) { self.insert(row, data.data()); })
      .def("__contains__", &RowCache::contains)
      .def("__len__", &RowCache::size)
      .def_property_readonly("num_slots", &RowCache::num_slots);
}

}  // namespace dataeff
