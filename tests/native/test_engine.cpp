#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "errors.h"
#include "storage/engine.h"

using namespace dataeff;
using std::chrono::microseconds;
using std::chrono::seconds;

namespace {

class ScratchFile {
 public:
  ScratchFile() {
    char path[] = "./native-XXXXXX";
    fd = mkostemp(path, O_CLOEXEC);
    CHECK(fd >= 0);
    unlink(path);
  }
  ~ScratchFile() { ::close(fd); }
  int fd;
};

using MakeEngine = std::shared_ptr<Engine> (*)(int, std::shared_ptr<FaultPlan>);

// Every engine that runs here.
const std::vector<MakeEngine>& engines() {
  static const std::vector<MakeEngine> all = [] {
    std::vector<MakeEngine> runnable{make_threads_engine};
    try {
      make_uring_engine(1, nullptr);
      runnable.push_back(make_uring_engine);
    } catch (const OsError& e) {
      std::printf("(no io_uring: %s) ", e.what());
    }
    return runnable;
  }();
  return all;
}

void wait(Transfer& transfer) {
  CHECK(transfer.wait_for(seconds(120)));
  if (const auto* failure = transfer.failure()) {
    native::fail(__FILE__, __LINE__, failure->text);
  }
}

// One caller's life: writes, reads back and compares stretches of its own part of the file, and
// cancels some of the writes.
void live(Engine& engine, int fd, int seed, int num_rounds, std::atomic<int>& num_wrong) {
  constexpr int64_t kPart = int64_t{4} << 20;
  std::mt19937 random(seed);
  std::vector<char> source(kPart), target(kPart);
  for (int round = 0; round < num_rounds; ++round) {
    const int64_t nbytes = 1 + random() % (kPart - 1);
    const int64_t offset = seed * kPart;
    std::memset(source.data(), random() % 256, nbytes);
    const auto unwanted = engine.submit(Op::kWrite, fd, target.data(), nbytes, offset);
    const bool cancelled = unwanted->cancel();
    CHECK(unwanted->wait_for(seconds(120)));
    num_wrong += cancelled != unwanted->cancelled();
    wait(*engine.submit(Op::kWrite, fd, source.data(), nbytes, offset));
    wait(*engine.submit(Op::kRead, fd, target.data(), nbytes, offset));
    num_wrong += std::memcmp(source.data(), target.data(), nbytes) != 0;
  }
}

void stress(MakeEngine make, std::shared_ptr<FaultPlan> faults) {
  ScratchFile file;
  const auto engine = make(3, std::move(faults));
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> callers;
  for (int seed = 0; seed < 4; ++seed) {
    callers.emplace_back([&, seed] { live(*engine, file.fd, seed, 15, num_wrong); });
  }
  for (std::thread& caller : callers) caller.join();
  engine->close(false);
  CHECK_EQ(num_wrong.load(), 0);
}

}  // namespace

TEST(callers_do_not_disturb_one_another) {
  for (MakeEngine make : engines()) stress(make, nullptr);
}

TEST(nor_with_faults) {
  for (MakeEngine make : engines()) {
    const auto faults = std::make_shared<FaultPlan>();
    faults->add(std::nullopt, {.max_nbytes = 300'001}, 1, 2, std::nullopt);
    faults->add(Op::kRead, {.error = EINTR}, 1, 3, std::nullopt);
    faults->add(Op::kWrite, {.error = EAGAIN}, 2, 5, std::nullopt);
    faults->add(std::nullopt, {.delay = microseconds(200)}, 1, 7, std::nullopt);
    stress(make, faults);
  }
}

TEST(one_failing_piece_fails_its_transfer_once) {
  for (MakeEngine make : engines()) {
    ScratchFile file;
    const auto faults = std::make_shared<FaultPlan>();
    faults->add(Op::kWrite, {.error = EIO}, 3, 4, std::nullopt);
    const auto engine = make(4, faults);
    std::vector<char> source(8 << 20, 'x');
    for (int round = 0; round < 20; ++round) {
      const auto transfer = engine->submit(Op::kWrite, file.fd, source.data(), source.size(), 0);
      CHECK(transfer->wait_for(seconds(120)));
      CHECK(transfer->failure() != nullptr);
      CHECK_EQ(transfer->failure()->code, EIO);
    }
  }
}

TEST(closing_while_others_submit) {
  for (MakeEngine make : engines()) {
    for (bool cancel : {false, true}) {
      ScratchFile file;
      const auto engine = make(2, nullptr);
      std::vector<char> source(100'000, 'y');
      std::atomic<int> num_refused{0};
      std::vector<std::thread> callers;
      for (int i = 0; i < 3; ++i) {
        callers.emplace_back([&] {
          std::vector<std::shared_ptr<Transfer>> transfers;
          try {
            for (;;) {
              transfers.push_back(
                  engine->submit(Op::kWrite, file.fd, source.data(), source.size(), 0));
            }
          } catch (const std::invalid_argument&) {
            ++num_refused;
          }
          for (const auto& transfer : transfers) CHECK(transfer->wait_for(seconds(120)));
        });
      }
      std::this_thread::sleep_for(microseconds(20'000));
      std::thread closer([&] { engine->close(cancel); });
      engine->close(cancel);
      closer.join();
      for (std::thread& caller : callers) caller.join();
      CHECK_EQ(num_refused.load(), 3);
    }
  }
}

TEST(dropping_an_engine_ends_its_transfers) {
  for (MakeEngine make : engines()) {
    ScratchFile file;
    std::vector<char> source(3 << 20, 'z');
    std::vector<std::shared_ptr<Transfer>> transfers;
    {
      const auto engine = make(2, nullptr);
      for (int i = 0; i < 30; ++i) {
        transfers.push_back(engine->submit(Op::kWrite, file.fd, source.data(), source.size(), 0));
      }
    }
    for (const auto& transfer : transfers) CHECK(transfer->done());
  }
}

TEST(the_end_of_the_file) {
  for (MakeEngine make : engines()) {
    ScratchFile file;
    CHECK_EQ(ftruncate(file.fd, 1000), 0);
    const auto engine = make(1, nullptr);
    std::vector<char> target(2000);
    const auto transfer = engine->submit(Op::kRead, file.fd, target.data(), 1001, 0);
    CHECK(transfer->wait_for(seconds(120)));
    CHECK(transfer->failure() && transfer->failure()->end_of_file);
    CHECK_THROWS(engine->submit(Op::kRead, file.fd, target.data(), -1, 0), std::invalid_argument);
  }
}
