#include "storage/striped_spill.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "errors.h"

namespace dataeff {
namespace {

constexpr int64_t kMaxFailures = 3;
constexpr double kNewestWeight = 0.2;  // of the latest transfer in the estimate of a lane's rate

}  // namespace

std::string SpillPart::place() const {
  return "offset " + std::to_string(offset) + " of the spill file in " + lane->space->directory();
}

void StripedSpill::add(std::shared_ptr<SpillSpace> space, std::shared_ptr<Engine> engine) {
  std::lock_guard lock(mutex_);
  lanes_.push_back(std::make_unique<SpillLane>());
  lanes_.back()->space = std::move(space);
  lanes_.back()->engine = std::move(engine);
}

std::shared_ptr<Stripe> StripedSpill::write(char* data, int64_t nbytes,
                                            std::shared_ptr<void> source) {
  auto stripe = std::make_shared<Stripe>(shared_from_this(), data, nbytes, std::move(source));
  const int64_t chunk = chunk_nbytes_.value_or(std::max<int64_t>(nbytes, 1));
  for (int64_t begin = 0; begin < nbytes; begin += chunk) {
    stripe->parts_.push_back(place(begin, std::min(chunk, nbytes - begin), nullptr));
  }
  for (SpillPart& part : stripe->parts_) stripe->submit(part);
  return stripe;
}

SpillPart StripedSpill::place(int64_t begin, int64_t nbytes, const SpillLane* avoid) {
  std::lock_guard lock(mutex_);
  double sum = 0;
  int num_known = 0;
  std::vector<SpillLane*> lanes;
  for (const auto& lane : lanes_) {
    if (lane->rate > 0) sum += lane->rate, ++num_known;
    if (lane->retired.empty() && lane.get() != avoid) lanes.push_back(lane.get());
  }
  const double typical = num_known ? sum / num_known : 1.0;
  const auto time_of = [&](const SpillLane* lane) {
    return (lane->in_flight_nbytes + nbytes) / (lane->rate > 0 ? lane->rate : typical);
  };
  std::stable_sort(lanes.begin(), lanes.end(),
                   [&](const SpillLane* a, const SpillLane* b) { return time_of(a) < time_of(b); });
  std::string refusals;
  for (SpillLane* lane : lanes) {
    try {
      const int64_t offset = lane->space->allocate(nbytes);
      lane->in_flight_nbytes += nbytes;
      int64_t used = 0;
      for (const auto& each : lanes_) used += each->space->used();
      peak_ = std::max(peak_, used);
      return {lane, offset, begin, nbytes, nullptr};
    } catch (const OsError& error) {
      if (!is_full(error.code())) note_failure(*lane, error.what());
      if (!refusals.empty()) refusals += "; ";
      refusals += lane->space->directory() + ": " + error.what();
    }
  }
  if (refusals.empty()) refusals = "none is left";
  throw OsError(ENOSPC,
                "no directory takes " + std::to_string(nbytes) + " bytes more (" + refusals + ")");
}

void StripedSpill::note_failure(SpillLane& lane, const std::string& why) {
  ++lane.num_failures;
  const bool others = std::any_of(lanes_.begin(), lanes_.end(), [&](const auto& other) {
    return other.get() != &lane && other->retired.empty();
  });
  if (lane.num_failures < kMaxFailures || !others || !lane.retired.empty()) return;
  lane.retired = why;
  warnings_.push_back("nothing more is spilled to " + lane.space->directory() + ": " + why);
}

void StripedSpill::finished(SpillPart& part, const std::string* failure) {
  std::lock_guard lock(mutex_);
  SpillLane& lane = *part.lane;
  part.open = false;
  lane.in_flight_nbytes -= part.nbytes;
  if (failure) {
    note_failure(lane, *failure);
  } else if (part.transfer && !part.transfer->cancelled() && !part.transfer->failed()) {
    lane.written_nbytes += part.nbytes;
    const int64_t elapsed_ns = part.transfer->end_ns() - part.transfer->start_ns();
    const double rate = static_cast<double>(part.nbytes) / std::max<int64_t>(elapsed_ns, 1);
    lane.rate += (lane.rate > 0 ? kNewestWeight : 1.0) * (rate - lane.rate);
  }
}

int64_t StripedSpill::used() const {
  std::lock_guard lock(mutex_);
  int64_t used = 0;
  for (const auto& lane : lanes_) used += lane->space->used();
  return used;
}

int64_t StripedSpill::peak() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

std::vector<SpillLane> StripedSpill::lanes() const {
  std::lock_guard lock(mutex_);
  std::vector<SpillLane> lanes;
  for (const auto& lane : lanes_) lanes.push_back(*lane);
  return lanes;
}

std::vector<std::string> StripedSpill::take_warnings() {
  std::lock_guard lock(mutex_);
  return std::exchange(warnings_, {});
}

void StripedSpill::close() {
  for (const auto& lane : lanes_) {
    lane->engine->close(/*cancel=*/false);
    lane->space->close();
  }
}

// ---- the write ----

Stripe::~Stripe() {
  // In a forked child nothing ever ends, and the locks may be held by threads that do not exist.
  if (parts_.empty() || parts_.front().lane->engine->of_this_process()) free();
}

void Stripe::submit(SpillPart& part) {
  SpillLane& lane = *part.lane;
  part.transfer = lane.engine->submit(Op::kWrite, lane.space->fd(), data_ + part.begin, part.nbytes,
                                      part.offset);
}

bool Stripe::ended() const {
  return std::all_of(parts_.begin(), parts_.end(),
                     [](const SpillPart& part) { return !part.transfer || part.transfer->done(); });
}

bool Stripe::done() const {
  std::lock_guard lock(mutex_);
  return ended();
}

bool Stripe::wait_for(std::chrono::nanoseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::lock_guard waiting(waiting_);
  for (;;) {
    std::unique_lock lock(mutex_);
    const auto part =
        std::find_if(parts_.begin(), parts_.end(), [](const SpillPart& each) { return each.open; });
    if (part == parts_.end()) return true;
    const std::shared_ptr<Transfer> transfer = part->transfer;
    if (!transfer->done()) {
      lock.unlock();  // only who holds `waiting_` changes the parts
      if (!transfer->wait_for(deadline - std::chrono::steady_clock::now())) return false;
      lock.lock();
    }
    if (!transfer->cancelled() && !transfer->failure()) {
      owner_->finished(*part, nullptr);
    } else {
      const Failure failure = transfer->cancelled()
                                  ? Failure{ECANCELED, transfer->describe() + " was cancelled"}
                                  : Failure{transfer->failure()->code, transfer->failure()->text};
      owner_->finished(*part, &failure.text);
      write_elsewhere(*part, failure);
    }
  }
}

void Stripe::write_elsewhere(SpillPart& part, const Failure& failure) {
  try {
    SpillPart other = owner_->place(part.begin, part.nbytes, part.lane);
    std::swap(part, other);  // so that whatever happens the new extent is known
    other.lane->space->free(other.offset);
    submit(part);
  } catch (const std::exception&) {
    // What went wrong first is what the user has to know.
    if (!failure_) failure_ = failure;
    if (part.open) owner_->finished(part, nullptr);
  }
}

std::optional<Stripe::Failure> Stripe::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

const Transfer& Stripe::under_way() const {
  std::lock_guard lock(mutex_);
  const auto open =
      std::find_if(parts_.begin(), parts_.end(), [](const SpillPart& part) { return part.open; });
  return *(open == parts_.end() ? parts_.front() : *open).transfer;
}

bool Stripe::cancel() {
  const std::unique_lock waiting(waiting_, std::try_to_lock);
  if (!waiting) return false;  // another thread waits, for as long as the disk takes
  std::lock_guard lock(mutex_);
  auto part = parts_.begin();
  // A part without a transfer is one that no lane would take.
  while (part != parts_.end() && part->transfer && part->transfer->cancel()) ++part;
  if (part == parts_.end()) {
    settle();
    failure_ = {ECANCELED, "the write was cancelled"};
    return true;
  }
  // Too late for one of them, so the others go on as well.
  for (auto stopped = parts_.begin(); stopped != part; ++stopped) submit(*stopped);
  return false;
}

std::shared_ptr<StripedRead> Stripe::read(char* data, std::shared_ptr<void> target) {
  auto read = std::make_shared<StripedRead>(shared_from_this(), std::move(target));
  std::lock_guard lock(mutex_);
  for (const SpillPart& part : parts_) {
    SpillPart& begun = read->parts_.emplace_back(part);
    begun.transfer = nullptr;
    begun.transfer = part.lane->engine->submit(Op::kRead, part.lane->space->fd(), data + part.begin,
                                               part.nbytes, part.offset);
  }
  return read;
}

void Stripe::free() {
  std::lock_guard waiting(waiting_);
  std::lock_guard lock(mutex_);
  for (const SpillPart& part : parts_) {
    if (part.transfer && !part.transfer->cancel()) {
      while (!part.transfer->wait_for(std::chrono::seconds{1})) continue;
    }
  }
  settle();
  for (const SpillPart& part : parts_) part.lane->space->free(part.offset);
  parts_.clear();
}

void Stripe::settle() {
  for (SpillPart& part : parts_) {
    if (part.open) owner_->finished(part, nullptr);
  }
}

void Stripe::drop_source() {
  std::shared_ptr<void> source;  // goes when the lock is given back
  std::lock_guard lock(mutex_);
  if (ended()) source.swap(source_);
}

std::string Stripe::place() const {
  std::lock_guard lock(mutex_);
  return parts_.empty() ? "no spill file" : parts_.front().place();
}

namespace {

int64_t first_start_ns(const std::vector<SpillPart>& parts) {
  int64_t first = 0;
  for (const SpillPart& part : parts) {
    const int64_t start = part.transfer ? part.transfer->start_ns() : 0;
    if (start && (!first || start < first)) first = start;
  }
  return first;
}

int64_t last_end_ns(const std::vector<SpillPart>& parts) {
  int64_t last = 0;
  for (const SpillPart& part : parts) {
    if (!part.transfer || !part.transfer->done()) return 0;
    last = std::max(last, part.transfer->end_ns());
  }
  return last;
}

}  // namespace

int64_t Stripe::start_ns() const {
  std::lock_guard lock(mutex_);
  return first_start_ns(parts_);
}

int64_t Stripe::end_ns() const {
  std::lock_guard lock(mutex_);
  return last_end_ns(parts_);
}

// ---- the read ----

StripedRead::~StripedRead() {
  for (const SpillPart& part : parts_) {
    if (!part.transfer || !part.transfer->of_this_process() || part.transfer->cancel()) continue;
    while (!part.transfer->wait_for(std::chrono::seconds{1})) continue;
  }
}

bool StripedRead::done() const {
  return std::all_of(parts_.begin(), parts_.end(),
                     [](const SpillPart& part) { return part.transfer->done(); });
}

bool StripedRead::wait_for(std::chrono::nanoseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  // The memory is free for others only when every part has ended, also after a failure.
  return std::all_of(parts_.begin(), parts_.end(), [&](const SpillPart& part) {
    return part.transfer->wait_for(deadline - std::chrono::steady_clock::now());
  });
}

const SpillPart* StripedRead::failed() const {
  for (const SpillPart& part : parts_) {
    if (part.transfer->cancelled() || part.transfer->failure()) return &part;
  }
  return nullptr;
}

const Transfer& StripedRead::under_way() const {
  for (const SpillPart& part : parts_) {
    if (!part.transfer->done()) return *part.transfer;
  }
  return *parts_.front().transfer;
}

int64_t StripedRead::start_ns() const { return first_start_ns(parts_); }

int64_t StripedRead::end_ns() const { return last_end_ns(parts_); }

}  // namespace dataeff
