// The entry points of csrc/*.cu for ctypes. An exception's text is copied to `error`.
#include <cstring>
#include <exception>

#include "cuda_runtime.h"
#include "gather/gather.h"
#include "gather/stored_rows.h"
#include "sampling/frontier.h"

using namespace dataeff;

template <typename Call>
static int guarded(char* error, const Call& call) {
  const int before = cuda_on_host::device;
  try {
    call();
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), 255);
  }
  return cuda_on_host::device == before ? cuda_on_host::launched_on : -2;
}

// Each returns the device that a kernel was last launched on, or -2 where the caller's current
// device has changed.
extern "C" int run_gather(std::byte* table, int64_t num_rows, int64_t row_nbytes,
                          int64_t row_stride, const void* ids, int64_t num_ids, int itemsize,
                          std::byte* out, int64_t* bad_count, int64_t* bad_seen, int device,
                          int num_blocks, const int64_t* places, const std::byte* hot,
                          int64_t hot_rows, int64_t hot_stride, const int32_t* slots, int64_t* hits,
                          int format, int element, const float* scales, char* error) {
  const RowCoding coding{static_cast<RowFormat>(format), static_cast<Element>(element), scales};
  const GatherOptions options{.hot = {hot, hot_rows, hot_stride, slots, hits},
                              .places = places,
                              .coding = format < 0 ? nullptr : &coding,
                              .num_blocks = num_blocks};
  return guarded(error, [&] {
    gather_cuda({table, num_rows, row_nbytes, row_stride}, {ids, num_ids, itemsize}, out,
                {bad_count, bad_seen}, device, 0, options);
  });
}

struct FrontierOfTest {
  const void* colptr;
  int64_t id_nbytes;
  const int64_t *node, *tree, *until;
  int64_t size;
  const int32_t* etype;
  const double* weight;
  const int64_t *time, *fanouts;
  int64_t num_fanouts, replace, last;
  uint64_t random_seed;
  int64_t hop, relation;

  Frontier get() const {
    const ColumnRules rules{etype, weight, time, fanouts, num_fanouts, replace != 0, last != 0};
    return {colptr,
            static_cast<int>(id_nbytes),
            node,
            tree,
            until,
            size,
            rules,
            random_seed,
            static_cast<int>(hop),
            static_cast<int>(relation)};
  }
};

extern "C" int run_count(const FrontierOfTest* frontier, int64_t* counts, int device, char* error) {
  return guarded(error, [&] { count_frontier_cuda(frontier->get(), counts, device, 0); });
}

extern "C" int run_choose(const FrontierOfTest* frontier, const int64_t* ends, int64_t* places,
                          int device, char* error) {
  return guarded(error, [&] { choose_frontier_cuda(frontier->get(), ends, places, device, 0); });
}
