#include <memory>

#include "storage/cufile.h"
#include "storage/engine.h"
#include "storage/threads_engine.h"

namespace dataeff {

std::shared_ptr<Engine> make_cufile_engine(const std::string& library, int num_threads) {
  Mover mover = [cufile = std::make_shared<Cufile>(library)](const PieceIo& io,
                                                             const PieceIo::Attempt& attempt) {
    const Transfer& transfer = io.transfer();
    return cufile->move(transfer.op, transfer.fd, attempt.data, attempt.nbytes, attempt.offset);
  };
  return std::make_shared<ThreadsEngine>("cufile", num_threads, nullptr, std::move(mover),
                                         /*any_memory=*/true);
}

}  // namespace dataeff
