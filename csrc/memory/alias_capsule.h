// One stretch of memory as a DLPack tensor of another device: a CUDA alias of registered memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dataeff {

// A "dltensor" capsule of `nbytes` bytes (uint8, one dimension) at `data` as memory of the device
// (DLPack's numbers: 1 is the CPU, 2 is CUDA). Whoever takes it holds `owner` until the tensor made
// of it is gone. Unlike the CUDA array interface it names the device, so that each GPU of a process
// can have an alias of memory that was registered once.
pybind11::capsule alias_capsule(uintptr_t data, int64_t nbytes, int device_type, int device_id,
                                pybind11::object owner);

}  // namespace dataeff
