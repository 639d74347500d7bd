// What the pretended device offers besides the runtime's own functions.
#pragma once

#include <functional>

namespace pretended_cuda {

// Runs `work` on `stream` (a cudaStream_t), in its order.
void enqueue(void* stream, std::function<void()> work);

// Breaks the device for good, as a failed assertion of a kernel does.
void fail(const char* why);

// Leaves an error for cudaGetLastError.
void refuse(int error);

}  // namespace pretended_cuda
