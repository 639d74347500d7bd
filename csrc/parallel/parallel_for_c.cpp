#include "parallel/parallel_for_c.h"

#include "parallel/parallel_for.h"

void dataeff_parallel_for(int64_t size, int64_t grain, int num_threads,
                          void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  dataeff::parallel_for(size, grain, num_threads,
                        [=](int64_t begin, int64_t end) { body(context, begin, end); });
}
