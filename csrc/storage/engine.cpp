#include "storage/engine.h"

#include <unistd.h>

#include <stdexcept>
#include <utility>

#include "errors.h"

namespace dataeff {

Engine::Engine(std::string name, std::shared_ptr<FaultPlan> faults)
    : faults_(std::move(faults)), name_(std::move(name)), pid_(getpid()) {}

bool Engine::of_this_process() const { return pid_ == getpid(); }

std::shared_ptr<Transfer> Engine::submit(Op op, int fd, char* data, int64_t nbytes, int64_t offset,
                                         int64_t room) {
  if (!of_this_process()) {
    throw std::runtime_error("this engine belongs to process " + std::to_string(pid_) +
                             ", and a fork copies none of its threads: open an engine in process " +
                             std::to_string(getpid()));
  }
  if (nbytes < 0 || offset < 0 || (data == nullptr && nbytes > 0)) {
    throw std::invalid_argument(std::string(op_name(op)) + ": nbytes=" + std::to_string(nbytes) +
                                " at offset=" + std::to_string(offset) + " from address " +
                                std::to_string(reinterpret_cast<uintptr_t>(data)) +
                                " makes no sense");
  }
  Alignment alignment;
  try {
    alignment = alignment_for(fd);
  } catch (const OsError&) {
    if (closed()) throw std::invalid_argument("the engine is closed");  // and its file as well
    throw;
  }
  if (offset % alignment.block != 0) {
    throw std::invalid_argument("offset=" + std::to_string(offset) + " must be a multiple of " +
                                std::to_string(alignment.block) +
                                ": the file is open for direct I/O");
  }
  auto transfer = std::make_shared<Transfer>(op, fd, data, nbytes, offset, alignment, room);
  if (!enqueue(transfer)) throw std::invalid_argument("the engine is closed");
  return transfer;
}

}  // namespace dataeff
