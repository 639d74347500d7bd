// Registration of existing host memory with CUDA, in place: afterwards kernels read it over the bus
// at its own address.
#pragma once

#include <cstdint>
#include <vector>

namespace dataeff {

// Registers [data, data + nbytes) for as long as it lives. Memory that is pinned already, by us or
// by its allocator, is used as it is; no bytes register nothing. Throws std::runtime_error with the
// reason and the remedy when CUDA refuses (or is not in the build), and leaves nothing registered.
class HostRegistration {
 public:
  HostRegistration(uintptr_t data, int64_t nbytes);
  ~HostRegistration() { close(); }
  HostRegistration(const HostRegistration&) = delete;
  HostRegistration& operator=(const HostRegistration&) = delete;

  // Releases the memory; a second call does nothing. The caller has seen to it that no kernel still
  // reads it.
  void close() noexcept;

 private:
  std::vector<uintptr_t> ranges_;
  int owner_pid_;
};

// Whether kernels can read all of [data, data + nbytes) at its host address.
bool is_registered(uintptr_t data, int64_t nbytes);

}  // namespace dataeff
