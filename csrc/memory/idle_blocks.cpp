#include "memory/idle_blocks.h"

#include <algorithm>
#include <utility>

namespace py = pybind11;

namespace dataeff {

void IdleBlocks::give(py::object block, int64_t nbytes) {
  blocks_.push_back({std::move(block), nbytes});
  nbytes_ += nbytes;
  shrink(kept_nbytes);
}

py::object IdleBlocks::take(int64_t least, int64_t most) {
  auto best = blocks_.end();
  for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
    if (block->nbytes < least || block->nbytes > most) continue;
    if (best == blocks_.end() || block->nbytes < best->nbytes) best = block;
  }
  if (best == blocks_.end()) return py::none();
  py::object found = std::move(best->object);
  nbytes_ -= best->nbytes;
  blocks_.erase(best);
  return found;
}

void IdleBlocks::shrink(int64_t nbytes) {
  while (nbytes_ > nbytes) {
    const Block oldest = std::move(blocks_.front());  // its end may run anything
    blocks_.pop_front();
    nbytes_ -= oldest.nbytes;
  }
}

Loan::Loan(std::shared_ptr<IdleBlocks> idle, py::object block, int64_t nbytes)
    : idle_(std::move(idle)), block_(std::move(block)), nbytes_(nbytes) {
  idle_->lent_nbytes_ += nbytes_;
}

Loan::~Loan() {
  idle_->lent_nbytes_ -= nbytes_;
  idle_->give(std::move(block_), nbytes_);
}

}  // namespace dataeff
