// parallel_for for code that is compiled at run time and knows only an address.
#pragma once

#include <cstdint>

extern "C" {

// parallel_for with a plain function and its context; `body` must not throw.
void dataeff_parallel_for(int64_t size, int64_t grain, int num_threads,
                          void (*body)(void* context, int64_t begin, int64_t end), void* context);
}
