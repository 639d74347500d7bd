// A libcuda of the same devices: what torch and cuFile ask of contexts, of which there is one,
// always current, and what is asked of the bus, where no such device is.
#include <cstdint>
#include <cstdio>

extern "C" {

using Context = void*;
static int context;

int cuInit(unsigned) { return 0; }
int cuDeviceGetPCIBusId(char* text, int size, int device) {
  return std::snprintf(text, size, "FFFF:%02X:00.0", device), 0;
}
int cuCtxGetCurrent(Context* found) { return *found = &context, 0; }
int cuCtxSetCurrent(Context) { return 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, 0;
}
int cuDevicePrimaryCtxRetain(Context* found, int) { return *found = &context, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuGetErrorString(int, const char** text) { return *text = "an error of the driver", 0; }
int cuPointerGetAttribute(void* found, int attribute, uint64_t) {
  if (attribute == 1) return *static_cast<Context*>(found) = &context, 0;
  if (attribute == 9) return *static_cast<int*>(found) = 0, 0;
  return 1;
}
int pretended_cuda_not_supported(const char*) { return 801; }

}  // extern "C"
