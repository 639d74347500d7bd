// The CUDA gather of a core that was compiled without nvcc.
#ifndef DATAEFF_WITH_CUDA

#include "errors.h"
#include "gather/gather.h"

namespace dataeff {

void gather_cuda(const RowTable&, const RowIndex&, std::byte*, const BadIndexReport&, int,
                 uintptr_t, const GatherOptions&) {
  throw_no_cuda();
}

}  // namespace dataeff

#endif
