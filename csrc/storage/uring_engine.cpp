#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "errors.h"
#include "storage/engine.h"
#include "storage/piece_io.h"
#include "storage/transfer_queue.h"
#include "storage/uring.h"

namespace dataeff {

#ifdef DATAEFF_WITH_URING
namespace {

// user_data of a completion: a slot's index, or the bell; the top bit marks the end of a pause.
constexpr uint64_t kBell = uint64_t{1} << 62;
constexpr uint64_t kPause = uint64_t{1} << 63;

class EventFd {
 public:
  EventFd() : fd(eventfd(0, EFD_CLOEXEC)) {
    if (fd < 0) throw OsError(errno, "creating an eventfd");
  }
  ~EventFd() { ::close(fd); }
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;
  void ring() const {
    const uint64_t one = 1;
    // Fails only when the counter is full, and then the bell rings already.
    (void)!::write(fd, &one, sizeof(one));
  }
  const int fd;
};

// One piece on its way. Its memory stays in place while the kernel has the request.
struct Slot {
  std::optional<PieceIo> io;
  PieceIo::Attempt attempt;
  BounceBuffer bounce;
  __kernel_timespec pause{};
};

// What the ring's thread works on; the owner only pushes to the queue and rings the bell.
class Loop {
 public:
  Loop(int depth, FaultPlan* faults)
      : uring_(std::in_place, depth + 1), slots_(depth), faults_(faults) {
    for (int i = depth - 1; i >= 0; --i) idle_.push_back(i);
  }

  // Until the queue is closed and empty. The ring goes then, and its descriptor; the bell, which
  // others may still be about to ring, with this object.
  void run() {
    serve();
    uring_.reset();
  }

  TransferQueue queue;
  EventFd bell;

 private:
  void serve() {
    listen();
    for (;;) {
      fill();
      if (idle_.size() == slots_.size() && !listening_) return;
      try {
        uring_->submit_and_wait();
      } catch (const OsError&) {
        go_on_without_ring();
        return;
      }
      uint64_t user_data;
      int32_t result;
      while (uring_->reap(user_data, result)) complete(user_data, result);
    }
  }

  // Asks to be told when the bell rings: that is how a thread that waits for the disk also hears
  // of new work.
  void listen() {
    io_uring_sqe& sqe = uring_->prepare();
    sqe.opcode = IORING_OP_READ;
    sqe.fd = bell.fd;
    sqe.addr = reinterpret_cast<uint64_t>(&num_rings_);
    sqe.len = sizeof(num_rings_);
    sqe.user_data = kBell;
    listening_ = true;
  }

  void fill() {
    // One slot in four looks for writes first, so that reads cannot starve them.
    for (Piece piece; !idle_.empty();) {
      if (!queue.try_take(idle_.size() % 4 == 0 ? Op::kWrite : Op::kRead, piece)) return;
      begin(std::move(piece));
    }
  }

  // Moves the piece in a slot that is idle.
  void begin(Piece piece) {
    const int index = idle_.back();
    idle_.pop_back();
    Slot& slot = slots_[index];
    slot.io.emplace(std::move(piece), slot.bounce, faults_);
    attempt(index);
  }

  // The kernel takes no more requests (its descriptor was closed by somebody, say). What it has
  // taken ends without being asked for; the rest is moved here by blocking calls.
  void go_on_without_ring() {
    lost_ = true;
    uint64_t user_data;
    int32_t result;
    while (uring_->take_back(user_data)) {
      if (user_data != kBell) send(static_cast<int>(user_data & ~kPause));
    }
    while (idle_.size() < slots_.size()) {
      // Its completions are handed over whenever this thread returns from a system call.
      std::this_thread::sleep_for(std::chrono::microseconds{100});
      while (uring_->reap(user_data, result)) complete(user_data, result);
    }
    Op preferred = Op::kRead;
    for (Piece piece; queue.take(preferred, piece);) {
      begin(std::move(piece));
      preferred = preferred == Op::kRead ? Op::kWrite : Op::kRead;
    }
  }

  // Starts the slot's next attempt, after its pause.
  void attempt(int index) {
    Slot& slot = slots_[index];
    slot.attempt = slot.io->next();
    const int64_t pause_ns = slot.attempt.pause.count();
    if (pause_ns > 0 && lost_) std::this_thread::sleep_for(slot.attempt.pause);
    if (pause_ns == 0 || lost_) {
      send(index);
      return;
    }
    slot.pause = {pause_ns / 1'000'000'000, pause_ns % 1'000'000'000};
    io_uring_sqe& sqe = uring_->prepare();
    sqe.opcode = IORING_OP_TIMEOUT;
    sqe.addr = reinterpret_cast<uint64_t>(&slot.pause);
    sqe.len = 1;
    sqe.user_data = kPause | index;
  }

  void send(int index) {
    Slot& slot = slots_[index];
    if (slot.attempt.fault.error) {
      advance(index, -slot.attempt.fault.error);
      return;
    }
    if (lost_) {
      advance(index, slot.io->call(slot.attempt));
      return;
    }
    const Transfer& transfer = slot.io->transfer();
    io_uring_sqe& sqe = uring_->prepare();
    sqe.opcode = transfer.op == Op::kRead ? IORING_OP_READ : IORING_OP_WRITE;
    sqe.fd = transfer.fd;
    sqe.addr = reinterpret_cast<uint64_t>(slot.attempt.data);
    sqe.len = static_cast<uint32_t>(slot.attempt.nbytes);
    sqe.off = slot.attempt.offset;
    // Through the page cache the kernel would copy here and now, one request after the other; its
    // worker threads copy in parallel.
    if (!transfer.alignment.direct) sqe.flags = IOSQE_ASYNC;
    sqe.user_data = index;
  }

  void complete(uint64_t user_data, int32_t result) {
    if (user_data == kBell) {
      listening_ = false;
      if (!queue.closed() && !lost_) listen();
    } else if (user_data & kPause) {
      send(static_cast<int>(user_data & ~kPause));
    } else {
      advance(static_cast<int>(user_data), result);
    }
  }

  void advance(int index, int64_t result) {
    Slot& slot = slots_[index];
    if (slot.io->advance(slot.attempt, result)) {
      slot.io.reset();
      idle_.push_back(index);
    } else {
      attempt(index);
    }
  }

  std::optional<Uring> uring_;
  std::vector<Slot> slots_;
  std::vector<int> idle_;
  FaultPlan* const faults_;
  uint64_t num_rings_ = 0;
  bool listening_ = false;
  bool lost_ = false;  // the ring takes no more
};

class UringEngine final : public Engine {
 public:
  UringEngine(int depth, std::shared_ptr<FaultPlan> faults)
      : Engine("io_uring", std::move(faults)), state_(std::make_unique<State>(depth, faults_)) {
    state_->thread = std::thread([loop = &state_->loop] { loop->run(); });
  }

  ~UringEngine() override {
    close(/*cancel=*/true);
    // As with the threads engine: a forked child has nothing to join.
    if (!of_this_process()) (void)state_.release();
  }

  void close(bool cancel) override {
    if (!of_this_process()) return;
    state_->loop.queue.close(cancel);
    state_->loop.bell.ring();
    std::lock_guard lock(state_->joining);
    if (state_->thread.joinable()) state_->thread.join();
  }

  bool closed() const override { return state_->loop.queue.closed(); }

 protected:
  bool enqueue(std::shared_ptr<Transfer> transfer) override {
    if (!state_->loop.queue.push(std::move(transfer))) return false;
    state_->loop.bell.ring();
    return true;
  }

 private:
  struct State {
    State(int depth, const std::shared_ptr<FaultPlan>& faults)
        : faults(faults), loop(depth, faults.get()) {}
    const std::shared_ptr<FaultPlan> faults;
    Loop loop;
    std::mutex joining;
    std::thread thread;
  };

  std::unique_ptr<State> state_;
};

}  // namespace
#endif

std::shared_ptr<Engine> make_uring_engine(int queue_depth, std::shared_ptr<FaultPlan> faults) {
  if (queue_depth < 1 || queue_depth > 4096) {
    throw std::invalid_argument("queue_depth=" + std::to_string(queue_depth) +
                                " is not between 1 and 4096");
  }
#ifdef DATAEFF_WITH_URING
  return std::make_shared<UringEngine>(queue_depth, std::move(faults));
#else
  throw OsError(ENOSYS, "dataeff was built without linux/io_uring.h (Linux headers 5.6 or later)");
#endif
}

}  // namespace dataeff
