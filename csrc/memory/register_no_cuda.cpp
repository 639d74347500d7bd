// Registration in a core that was compiled without nvcc.
#ifndef DATAEFF_WITH_CUDA

#include "errors.h"
#include "memory/register.h"

namespace dataeff {

HostRegistration::HostRegistration(uintptr_t, int64_t) { throw_no_cuda(); }
void HostRegistration::close() noexcept {}
bool is_registered(uintptr_t, int64_t) { return false; }

}  // namespace dataeff

#endif
