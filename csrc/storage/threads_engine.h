// Pieces moved by blocking calls, on threads of the engine's own.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "storage/engine.h"
#include "storage/piece_io.h"
#include "storage/transfer_queue.h"

namespace dataeff {

// Makes one attempt at a piece: a byte count, or a negative errno.
using Mover = std::function<int64_t(const PieceIo&, const PieceIo::Attempt&)>;

class ThreadsEngine final : public Engine {
 public:
  // `any_memory`: the mover takes addresses, lengths and offsets as they are, also where the file
  // is open for direct I/O, so that memory the processor cannot read is never bounced.
  ThreadsEngine(std::string name, int num_threads, std::shared_ptr<FaultPlan> faults, Mover mover,
                bool any_memory);
  ~ThreadsEngine() override;

  void close(bool cancel) override;
  bool closed() const override { return state_->queue.closed(); }

 protected:
  bool enqueue(std::shared_ptr<Transfer> transfer) override;
  Alignment alignment_for(int fd) const override;

 private:
  struct State {
    TransferQueue queue;
    Mover mover;
    std::mutex joining;
    std::vector<std::thread> workers;
  };

  void serve(int index, int num_threads);

  const bool any_memory_;
  std::unique_ptr<State> state_;
};

}  // namespace dataeff
