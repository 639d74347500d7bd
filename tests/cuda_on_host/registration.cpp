// The registration of csrc/memory/register.cu for ctypes, and the switches of the runtime under it.
#include <cstring>
#include <exception>

#include "cuda_runtime.h"
#include "memory/register.h"
#include "memory/wsl.h"

using namespace dataeff;

static bool wsl = false;

bool dataeff::under_wsl(const char*) { return wsl; }

extern "C" void set_wsl(bool is_there) { wsl = is_there; }

extern "C" HostRegistration* open_registration(uintptr_t data, int64_t nbytes, char* error) {
  try {
    return new HostRegistration(data, nbytes);
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), 511);
    return nullptr;
  }
}

extern "C" void close_registration(HostRegistration* registration) { delete registration; }

extern "C" int memory_is_registered(uintptr_t data, int64_t nbytes) {
  return is_registered(data, nbytes);
}

extern "C" void set_runtime(int num_devices, int uses_host_pointer, int knows_read_only,
                            int calls_to_failure, int failure) {
  cuda_on_host::num_devices = num_devices;
  cuda_on_host::attributes[0] = uses_host_pointer;
  cuda_on_host::attributes[1] = knows_read_only;
  cuda_on_host::calls_to_failure = calls_to_failure;
  cuda_on_host::failure = static_cast<cudaError_t>(failure);
}

// Other code's memory.
extern "C" void register_elsewhere(void* data, int64_t nbytes) {
  cudaHostRegister(data, nbytes, 0);
}

extern "C" void unregister_elsewhere(void* data) { cudaHostUnregister(data); }

// (begin, end, flags) of each registration, at most `most` of them; how many there are.
extern "C" int registrations(int64_t* found, int most) {
  int i = 0;
  for (const auto& [begin, what] : cuda_on_host::registered) {
    if (i == most) break;
    found[3 * i] = static_cast<int64_t>(begin);
    found[3 * i + 1] = static_cast<int64_t>(what.end);
    found[3 * i++ + 2] = what.flags;
  }
  return static_cast<int>(cuda_on_host::registered.size());
}

extern "C" int error_left_behind() { return cudaGetLastError(); }
