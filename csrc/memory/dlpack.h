// DLPack's structures, as its C interface lays them out (dmlc/dlpack, version 1.3).
#pragma once

#include <cstdint>

namespace dataeff {

constexpr int32_t kDlCpu = 1;  // a device_type

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// Codes of a DLDataType.
constexpr uint8_t kDlInt = 0, kDlUInt = 1, kDlFloat = 2, kDlBfloat = 4, kDlComplex = 5;

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // null where the elements are in order without gaps
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// What a framework's tensor type offers to C code, as its attribute `__dlpack_c_exchange_api__`: a
// capsule of that name. The functions not called here are left untyped.
struct DLPackExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  DLPackExchangeApi* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  // Describes the tensor `object`, whose memory and shape `out` borrows; not 0, with a Python
  // exception set, when it has none. May be null.
  int (*describe)(void* object, DLTensor* out);
  void* current_stream;
};

}  // namespace dataeff
