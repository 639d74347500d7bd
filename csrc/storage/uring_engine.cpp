#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

#include "errors.h"
#include "storage/engine.h"
#include "storage/transfer_queue.h"
#include "storage/uring_pieces.h"

namespace dataeff {

#ifdef DATAEFF_WITH_URING
namespace {

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

// What the ring's thread works on; the owner only pushes to the queue and rings the bell.
class Loop final : private UringPieces {
 public:
  Loop(int depth, FaultPlan* faults) : UringPieces(depth, /*num_others=*/1, faults) {}

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
    while (!lost()) {
      fill();
      if (idle() && !listening_) return;
      wait();
    }
    Op preferred = Op::kRead;
    for (Piece piece; queue.take(preferred, piece);) {
      begin(std::move(piece));
      preferred = preferred == Op::kRead ? Op::kWrite : Op::kRead;
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
    sqe.user_data = kOther;
    listening_ = true;
  }

  void fill() {
    // One slot in four looks for writes first, so that reads cannot starve them.
    for (Piece piece; !full();) {
      if (!queue.try_take(num_idle() % 4 == 0 ? Op::kWrite : Op::kRead, piece)) return;
      begin(std::move(piece));
    }
  }

  // The bell has rung.
  void other() override {
    listening_ = false;
    if (!queue.closed() && !lost()) listen();
  }

  // The kernel would copy through the page cache, or look up and pin the pages of direct I/O, here
  // and now, one request after the other; its threads do so in parallel.
  bool in_parallel() const override { return true; }

  uint64_t num_rings_ = 0;
  bool listening_ = false;
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
