// Blocks of host memory between their uses, and those lent out until a tensor over them goes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <memory>

namespace dataeff {

// Blocks that nothing uses, whatever they are for Python, oldest first; guarded by the GIL. A
// tensor's end returns its block wherever a graph is freed: no line of Python runs then, where a
// signal would be heard and what its handler raises be lost.
class IdleBlocks {
 public:
  explicit IdleBlocks(int64_t kept_nbytes) : kept_nbytes(kept_nbytes) {}

  // Returns a block; the blocks returned longest ago make room for it.
  void give(pybind11::object block, int64_t nbytes);

  // The smallest block of `least` to `most` bytes, which is idle no more, or None.
  pybind11::object take(int64_t least, int64_t most);

  // Lets go the blocks returned longest ago until the others take `nbytes` at most.
  void shrink(int64_t nbytes);

  int64_t nbytes() const { return nbytes_; }
  int64_t lent_nbytes() const { return lent_nbytes_; }

  const int64_t kept_nbytes;  // the most that idle blocks may take

 private:
  friend class Loan;
  struct Block {
    pybind11::object object;
    int64_t nbytes;
  };

  std::deque<Block> blocks_;
  int64_t nbytes_ = 0;
  int64_t lent_nbytes_ = 0;
};

// What a lent tensor holds: returns the block when it goes.
class Loan {
 public:
  Loan(std::shared_ptr<IdleBlocks> idle, pybind11::object block, int64_t nbytes);
  ~Loan();
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;

 private:
  const std::shared_ptr<IdleBlocks> idle_;
  pybind11::object block_;
  const int64_t nbytes_;
};

}  // namespace dataeff
