// A libcudart of two devices whose memory is the host's and whose streams are threads that run
// late.
//
// What CUDA leaves open is decided against the caller: a stream starts its work when somebody waits
// for it or some time later (by the seed), pageable memory is read at the call, and memory that was
// given back is filled with rubbish. A copy that runs after its memory is gone breaks the device
// for good, as on a real one.
#include "cudart.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Work = std::function<void()>;
using std::chrono::microseconds;

constexpr int kNumDevices = 2;
constexpr size_t kDeviceNbytes = size_t{16} << 30;
constexpr int kRubbish = 0xfb;
constexpr microseconds kHeldUs{20000};

// --- what a thread is told of errors; a broken device stays broken

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;
std::atomic<int> broken{cudaSuccess};

cudaError_t tell(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}
cudaError_t state() { return tell(static_cast<cudaError_t>(broken.load())); }

void break_device(cudaError_t error, const std::string& why) {
  std::fprintf(stderr, "pretended device: %s\n", why.c_str());
  int none = cudaSuccess;
  broken.compare_exchange_strong(none, error);
}

// --- streams, all under one lock; never destroyed, since threads outlive the process's statics

struct Record {  // one recording of an event
  CUstream_st* stream;
  uint64_t number;
  bool done = false;
  Clock::time_point at;
};

struct Task {
  Work work;                        // or
  std::shared_ptr<Record> record;   // written when reached, or
  std::shared_ptr<Record> awaited;  // waited for; and in a captured graph, of each launch
  cudaEvent_t recorded_event = nullptr, awaited_event = nullptr;
  uint64_t number = 0;
  Clock::time_point queued;
};

struct Capture {
  std::vector<Task> tasks;
  CUstream_st* origin;
  cudaStreamCaptureMode mode;
  std::thread::id by;
  bool broken = false;
};
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

std::mutex& lock = *new std::mutex;
std::condition_variable& progress = *new std::condition_variable;  // of any stream
using Held = std::unique_lock<std::mutex>;
uint64_t seed = 0, num_streams = 0;

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b + 1;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

struct CUevent_st {
  int device = current_device;
  std::shared_ptr<Record> record;
  Capture* capture = nullptr;
  bool timed = true;
};

struct CUstream_st {
  uint64_t id = num_streams++;
  int device = current_device;
  bool blocking = true;
  int priority = 0;
  std::deque<Task> queue;
  uint64_t num_queued = 0, num_done = 0, demanded = 0;
  bool running = false, closing = false;
  std::condition_variable asked;  // for work, or for work sooner
  Capture* capture = nullptr;

  // How long a task may lie before it starts, and whether a waiting host shortens that.
  std::pair<microseconds, bool> lateness(uint64_t number) const {
    const uint64_t random = mix(mix(seed, id), number);
    switch (seed ? mix(seed, id) % 4 : 0) {
      case 1:
        return {microseconds(random % 2 ? random % 400 : 0), false};
      case 2:
        return {microseconds(300), false};
      case 3:
        return {kHeldUs, true};
      default:
        return {microseconds(0), true};
    }
  }

  void run() {
    Held held(lock);
    for (;;) {
      asked.wait(held, [&] { return !queue.empty() || closing; });
      if (queue.empty()) break;
      Task task = std::move(queue.front());
      const auto [late, hurries] = lateness(task.number);
      const auto from = hurries ? task.queued : Clock::now();
      if (late.count())
        asked.wait_until(held, from + late,
                         [&, hurries = hurries] { return hurries && demanded >= task.number; });
      if (task.awaited) {
        Record& awaited = *task.awaited;
        const auto demand = [&] {
          if (demanded >= task.number) awaited.stream->demand(awaited.number);
          return awaited.done;
        };
        progress.wait(held, demand);
      }
      if (task.work && broken == cudaSuccess) {
        held.unlock();
        task.work();
        task.work = nullptr;
        held.lock();
      }
      queue.pop_front();
      num_done = task.number;
      if (task.record) task.record->done = true, task.record->at = Clock::now();
      progress.notify_all();
    }
    running = false;
  }

  void demand(uint64_t number) {
    if (demanded >= number) return;
    demanded = number;
    asked.notify_all();
    progress.notify_all();  // it may be waiting for another, which is to hurry too
  }

  uint64_t push(Task task) {
    if (capture) {
      capture->tasks.push_back(std::move(task));
      return 0;
    }
    task.number = ++num_queued;
    task.queued = Clock::now();
    queue.push_back(std::move(task));
    if (!running) {
      running = true;
      std::thread(&CUstream_st::run, this).detach();
    }
    asked.notify_all();
    return num_queued;
  }

  std::shared_ptr<Record> tail() {
    auto record = std::make_shared<Record>(Record{this, num_queued});
    record->done = num_done == num_queued;
    if (!record->done) {
      record->number = num_queued + 1;
      push({.record = record});
    }
    return record;
  }

  void finish(Held& held, uint64_t number) {
    const auto done = [&] { return demand(number), num_done >= number; };
    progress.wait(held, done);
  }
};

namespace {

std::set<CUstream_st*>& streams = *new std::set<CUstream_st*>;
std::set<Capture*>& captures = *new std::set<Capture*>;  // under way

// Whether a call that might wait, or that gives memory out or takes it back, is refused by the
// rules of capture modes; it ends the captures then. `waits_for_all`: no mode allows it.
cudaError_t end_captures(bool waits_for_all = false) {
  cudaError_t error = cudaSuccess;
  for (Capture* capture : captures) {
    const bool own = capture->by == std::this_thread::get_id();
    const bool concerns = own ? capture->mode != cudaStreamCaptureModeRelaxed
                              : capture->mode == cudaStreamCaptureModeGlobal &&
                                    capture_mode == cudaStreamCaptureModeGlobal;
    if (!waits_for_all && (!concerns || capture_mode == cudaStreamCaptureModeRelaxed)) continue;
    capture->broken = true;
    error = cudaErrorStreamCaptureUnsupported;
  }
  return tell(error);
}
cudaError_t refused_by_captures() {
  const Held held(lock);
  return end_captures();
}

std::vector<CUstream_st*>& default_streams = *[] {
  auto* made = new std::vector<CUstream_st*>;
  for (int device = 0; device < kNumDevices; ++device) {
    made->push_back(new CUstream_st);
    made->back()->device = device;
  }
  return made;
}();

CUstream_st* stream_of(cudaStream_t stream) {
  const bool is_default = stream == nullptr || stream == cudaStreamLegacy;
  return is_default ? default_streams[current_device] : stream;
}

// Queues a task; the default stream and the blocking ones await each other.
uint64_t queue_on(cudaStream_t given, Task task) {
  CUstream_st* stream = stream_of(given);
  const auto await = [&](CUstream_st* other) {
    const auto record = other->tail();
    if (!record->done) stream->push({.awaited = record});
  };
  if (CUstream_st* legacy = default_streams[stream->device]; stream == legacy) {
    for (CUstream_st* other : streams)
      if (other->device == stream->device && other->blocking && !other->capture) await(other);
  } else if (stream->blocking && !stream->capture) {
    await(legacy);
  }
  return stream->push(std::move(task));
}

void record_on(cudaStream_t stream, cudaEvent_t event) {
  event->record = std::make_shared<Record>(Record{stream_of(stream), 0});
  // Known before the task may run: the lock is held.
  event->record->number = queue_on(stream, {.record = event->record});
}

// --- memory: ranges by address

struct Range {
  uintptr_t end;
  bool on_device, registered;
  int device = current_device;
};
std::map<uintptr_t, Range>& ranges = *new std::map<uintptr_t, Range>;
size_t device_nbytes_used[kNumDevices] = {};

const Range* range_at(uintptr_t address) {
  auto it = ranges.upper_bound(address);
  if (it == ranges.begin()) return nullptr;
  return (--it)->second.end > address ? &it->second : nullptr;
}
const Range* range_at(const void* data) { return range_at(reinterpret_cast<uintptr_t>(data)); }

bool overlaps(uintptr_t begin, uintptr_t end) {
  const auto next = ranges.lower_bound(begin);
  return range_at(begin) || (next != ranges.end() && next->first < end);
}

struct Side {  // of a copy
  uintptr_t begin;
  size_t nbytes;
  bool known, on_device, inside;

  Side(const void* data, size_t nbytes) : begin(reinterpret_cast<uintptr_t>(data)), nbytes(nbytes) {
    const Range* range = range_at(begin);
    known = range != nullptr;
    on_device = known && range->on_device;
    inside = known ? begin + nbytes <= range->end : !overlaps(begin, begin + nbytes);
  }
  void require_alive(const char* what) const {
    const Held held(lock);
    const Range* range = range_at(begin);
    if (known && !(range && begin + nbytes <= range->end && range->on_device == on_device))
      break_device(cudaErrorIllegalAddress, std::string(what) + " memory that is gone");
  }
};

cudaError_t allocate(void** data, size_t nbytes, bool on_device) {
  *data = nullptr;
  if (const auto error = state()) return error;
  if (const auto error = refused_by_captures()) return error;
  if (nbytes == 0) return cudaSuccess;
  const Held held(lock);
  if (on_device && device_nbytes_used[current_device] + nbytes > kDeviceNbytes)
    return tell(cudaErrorMemoryAllocation);
  const size_t size = (nbytes + 4095) & ~size_t{4095};
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return tell(cudaErrorMemoryAllocation);
  std::memset(memory, kRubbish, nbytes);
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  ranges[begin] = {begin + nbytes, on_device, false};
  if (on_device) device_nbytes_used[current_device] += nbytes;
  *data = memory;
  return cudaSuccess;
}

void finish_device(Held& held, int device) {
  default_streams[device]->finish(held, default_streams[device]->num_queued);
  for (CUstream_st* stream : std::set<CUstream_st*>(streams))
    if (stream->device == device && !stream->capture) stream->finish(held, stream->num_queued);
}
void finish_all(Held& held) {
  for (int device = 0; device < kNumDevices; ++device) finish_device(held, device);
}

cudaError_t give_back(void* data, bool on_device) {
  if (!data) return state();
  Held held(lock);
  if (const auto error = end_captures()) return error;
  finish_all(held);
  const auto it = ranges.find(reinterpret_cast<uintptr_t>(data));
  if (it == ranges.end() || it->second.on_device != on_device || it->second.registered)
    return tell(cudaErrorInvalidValue);
  const size_t nbytes = it->second.end - it->first;
  if (on_device) device_nbytes_used[it->second.device] -= nbytes;
  ranges.erase(it);
  munmap(data, (nbytes + 4095) & ~size_t{4095});
  return state();
}

// Whether the kind that the caller names is what the addresses say.
bool fits(cudaMemcpyKind kind, const Side& to, const Side& from) {
  switch (kind) {
    case cudaMemcpyHostToHost:
      return !to.on_device && !from.on_device;
    case cudaMemcpyHostToDevice:
      return to.on_device && !from.on_device;
    case cudaMemcpyDeviceToHost:
      return !to.on_device && from.on_device;
    case cudaMemcpyDeviceToDevice:
      return to.known && from.known;
    default:
      return true;
  }
}

cudaError_t copy(void* dst, const void* src, size_t nbytes, cudaMemcpyKind kind,
                 cudaStream_t stream, bool waits) {
  if (const auto error = state()) return error;
  if (nbytes == 0) return cudaSuccess;
  if (waits)
    if (const auto error = refused_by_captures()) return error;
  Held held(lock);
  const Side to(dst, nbytes), from(src, nbytes);
  if (!to.inside || !from.inside || !fits(kind, to, from)) return tell(cudaErrorInvalidValue);
  if (stream_of(stream)->capture && (waits || !to.known || !from.known))
    return tell(cudaErrorStreamCaptureUnsupported);
  Work work;
  if (!from.known && to.on_device) {
    auto staged = std::make_shared<std::vector<char>>(nbytes);
    held.unlock();
    std::memcpy(staged->data(), src, nbytes);
    held.lock();
    work = [=] {
      to.require_alive("a copy into");
      if (broken == cudaSuccess) std::memcpy(dst, staged->data(), nbytes);
    };
  } else {
    work = [=] {
      to.require_alive("a copy into");
      from.require_alive("a copy from");
      if (broken == cudaSuccess) std::memmove(dst, src, nbytes);
    };
  }
  const uint64_t number = queue_on(stream, {.work = std::move(work)});
  if (waits || !to.known) stream_of(stream)->finish(held, number);
  return state();
}

cudaError_t queue_work(cudaStream_t stream, Work work) {
  if (const auto error = state()) return error;
  const Held held(lock);
  if (stream_of(stream)->device != current_device) {
    break_device(cudaErrorInvalidResourceHandle, "a launch on a stream of another device");
    return tell(cudaErrorInvalidResourceHandle);
  }
  queue_on(stream, {.work = std::move(work)});
  return cudaSuccess;
}

}  // namespace

namespace pretended_cuda {

void enqueue(void* stream, Work work) { queue_work(static_cast<cudaStream_t>(stream), work); }

void refuse(int error) { tell(static_cast<cudaError_t>(error)); }

void fail(const char* why) { break_device(cudaErrorAssert, why); }

}  // namespace pretended_cuda

extern "C" {

void pretended_cuda_seed(uint64_t value) {
  Held held(lock);
  finish_all(held);
  seed = value;
}

void pretended_cuda_break(const char* why) { break_device(cudaErrorAssert, why); }

// Undefined functions of the runtime end here (see stubs in build.py).
cudaError_t pretended_cuda_missing(const char* name) {
  std::fprintf(stderr, "pretended device: %s is not pretended\n", name);
  return tell(cudaErrorNotSupported);
}

// --- the device

cudaError_t cudaGetDeviceCount(int* count) { return *count = kNumDevices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kNumDevices) return tell(cudaErrorInvalidDevice);
  current_device = device;
  return state();
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
  return std::snprintf(id, size, "0000:%02d:00.0", device + 1), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  Held held(lock);
  if (const auto error = end_captures(true)) return error;
  finish_device(held, current_device);
  return state();
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  if (device < 0 || device >= kNumDevices) return tell(cudaErrorInvalidDevice);
  *found = {};
  std::strcpy(found->name, "Pretended device");
  found->totalGlobalMem = kDeviceNbytes;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 227 << 10;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->regsPerBlock = found->regsPerMultiprocessor = 1 << 16;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 0x7fffffff;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->l2CacheSize = 50 << 20;
  found->unifiedAddressing = found->canMapHostMemory = found->concurrentKernels = 1;
  found->hostRegisterSupported = found->canUseHostPointerForRegisteredMem = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= kNumDevices) return tell(cudaErrorInvalidDevice);
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 132, cudaSuccess;
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrHostRegisterReadOnlySupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrUnifiedAddressing:
      return *value = 1, cudaSuccess;
    default:
      return *value = 0, cudaSuccess;
  }
}

// --- errors

cudaError_t cudaGetLastError() {
  const auto error = last_error;
  last_error = static_cast<cudaError_t>(broken.load());
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorHostMemoryNotRegistered:
      return "cudaErrorHostMemoryNotRegistered";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "cudaErrorOfThePretendedDevice";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// --- memory

cudaError_t cudaMalloc(void** data, size_t nbytes) { return allocate(data, nbytes, true); }
cudaError_t cudaFree(void* data) { return give_back(data, true); }
cudaError_t cudaHostAlloc(void** data, size_t nbytes, unsigned) {
  return allocate(data, nbytes, false);
}
cudaError_t cudaMallocHost(void** data, size_t nbytes) { return allocate(data, nbytes, false); }
cudaError_t cudaFreeHost(void* data) { return give_back(data, false); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Held held(lock);
  *total = kDeviceNbytes;
  *free = kDeviceNbytes - device_nbytes_used[current_device];
  return state();
}
cudaError_t cudaHostRegister(void* data, size_t nbytes, unsigned) {
  if (const auto error = state()) return error;
  if (const auto error = refused_by_captures()) return error;
  const Held held(lock);
  const auto begin = reinterpret_cast<uintptr_t>(data);
  unsigned char resident = 0;
  if (!data || !nbytes || mincore(reinterpret_cast<void*>(begin & ~4095), 1, &resident))
    return tell(cudaErrorInvalidValue);
  if (overlaps(begin, begin + nbytes)) return tell(cudaErrorHostMemoryAlreadyRegistered);
  ranges[begin] = {begin + nbytes, false, true};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* data) {
  if (const auto error = refused_by_captures()) return error;
  const Held held(lock);
  const auto it = ranges.find(reinterpret_cast<uintptr_t>(data));
  if (it == ranges.end() || !it->second.registered) return tell(cudaErrorHostMemoryNotRegistered);
  ranges.erase(it);
  return state();
}
cudaError_t cudaHostGetDevicePointer(void** found, void* data, unsigned) {
  const Held held(lock);
  const Range* range = range_at(data);
  if (!range || range->on_device) return tell(cudaErrorInvalidValue);
  return *found = data, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* data) {
  if (const auto error = state()) return error;
  const Held held(lock);
  *found = {};
  const Range* range = range_at(data);
  found->device = range ? range->device : -2;
  if (!range) return found->type = cudaMemoryTypeUnregistered, cudaSuccess;
  found->type = range->on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  found->devicePointer = const_cast<void*>(data);
  if (!range->on_device) found->hostPointer = found->devicePointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* dst, const void* src, size_t nbytes, cudaMemcpyKind kind) {
  return copy(dst, src, nbytes, kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t nbytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy(dst, src, nbytes, kind, stream, false);
}
cudaError_t cudaMemcpyPeerAsync(void* dst, int, const void* src, int, size_t nbytes,
                                cudaStream_t stream) {
  return copy(dst, src, nbytes, cudaMemcpyDefault, stream, false);
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t nbytes, cudaStream_t stream) {
  if (const auto error = state()) return error;
  const Held held(lock);
  const Side side(data, nbytes);
  if (!side.known || !side.inside) return tell(cudaErrorInvalidValue);
  queue_on(stream, {.work = [=] {
             side.require_alive("a fill of");
             if (broken == cudaSuccess) std::memset(data, value, nbytes);
           }});
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int value, size_t nbytes) {
  return cudaMemsetAsync(data, value, nbytes, nullptr);
}

// --- streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int priority) {
  if (const auto error = state()) return error;
  const Held held(lock);
  *made = new CUstream_st;
  (*made)->blocking = flags != cudaStreamNonBlocking;
  (*made)->priority = priority;
  streams.insert(*made);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
  return cudaStreamCreateWithPriority(made, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* made) {
  return cudaStreamCreateWithPriority(made, cudaStreamDefault, 0);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = stream_of(stream)->priority, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Held held(lock);
  streams.erase(stream);
  stream->closing = true;  // it finishes what it was given; never deleted
  stream->asked.notify_all();
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (const auto error = state()) return error;
  const Held held(lock);
  stream = stream_of(stream);
  if (const auto error = end_captures(stream->capture)) return error;
  return stream->num_done == stream->num_queued ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t given) {
  Held held(lock);
  CUstream_st* stream = stream_of(given);
  if (const auto error = end_captures(stream->capture)) return error;
  if (stream == default_streams[stream->device]) queue_on(stream, {});  // awaits the blocking ones
  stream->finish(held, stream->num_queued);
  return state();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t given, cudaEvent_t event, unsigned flags) {
  if (const auto error = state()) return error;
  const Held held(lock);
  CUstream_st* stream = stream_of(given);
  if (stream->capture && (flags & cudaEventWaitExternal)) {
    stream->push({.awaited_event = event});
  } else if (event->capture) {
    stream->capture = event->capture;
  } else if (stream->capture) {  // a graph cannot wait for what is outside of it
    stream->capture->broken = true;
    return tell(cudaErrorStreamCaptureIsolation);
  } else if (event->record) {
    queue_on(stream, {.awaited = event->record});
  }
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  return queue_work(stream, [=] { call(data); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data,
                                  unsigned) {
  return queue_work(stream, [=] { call(stream, cudaSuccess, data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned flags) {
  *made = new CUevent_st;
  (*made)->timed = !(flags & cudaEventDisableTiming);
  return state();
}
cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t given, unsigned flags) {
  if (const auto error = state()) return error;
  const Held held(lock);
  CUstream_st* stream = stream_of(given);
  if (stream->device != event->device) return tell(cudaErrorInvalidResourceHandle);
  if (stream->capture && (flags & cudaEventRecordExternal))
    return stream->push({.recorded_event = event}), cudaSuccess;
  event->capture = stream->capture;
  if (stream->capture) return cudaSuccess;
  record_on(given, event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const auto error = state()) return error;
  const Held held(lock);
  if (event->capture) return tell(cudaErrorCapturedEvent);
  if (const auto error = end_captures()) return error;
  return !event->record || event->record->done ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const auto error = state()) return error;
  Held held(lock);
  if (event->capture) return tell(cudaErrorCapturedEvent);
  if (const auto error = end_captures()) return error;
  if (const auto record = event->record) record->stream->finish(held, record->number);
  return state();
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  if (const auto error = state()) return error;
  const Held held(lock);
  if (!from->timed || !to->timed || !from->record || !to->record)
    return tell(cudaErrorInvalidResourceHandle);
  if (!from->record->done || !to->record->done) return tell(cudaErrorNotReady);
  *ms = std::chrono::duration<float, std::milli>(to->record->at - from->record->at).count();
  return cudaSuccess;
}

// --- captured graphs: what the streams of a capture were given, run one after another

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const Held held(lock);
  if (stream_of(stream) == default_streams[current_device])
    return tell(cudaErrorStreamCaptureUnsupported);
  stream->capture = new Capture{{}, stream, mode, std::this_thread::get_id()};
  captures.insert(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Held held(lock);
  Capture* capture = stream->capture;
  if (!capture || capture->origin != stream) return tell(cudaErrorInvalidValue);
  for (CUstream_st* other : streams)
    if (other->capture == capture) other->capture = nullptr;
  captures.erase(capture);
  *graph = capture->broken ? nullptr : reinterpret_cast<cudaGraph_t>(capture);
  return tell(capture->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Held held(lock);
  const bool capturing = stream_of(stream)->capture;
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* num_nodes) {
  cudaStreamIsCapturing(stream, status);
  Capture* capture = stream_of(stream)->capture;
  if (id) *id = reinterpret_cast<uintptr_t>(capture);
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Capture*>(graph)->tasks.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                          unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Capture(*reinterpret_cast<Capture*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (const auto error = state()) return error;
  const Held held(lock);
  for (const Task& task : reinterpret_cast<Capture*>(graph)->tasks) {
    if (task.recorded_event) {
      record_on(stream, task.recorded_event);
    } else if (!task.awaited_event) {
      queue_on(stream, task);
    } else if (const auto record = task.awaited_event->record) {
      queue_on(stream, {.awaited = record});
    }
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return delete reinterpret_cast<Capture*>(graph), cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<Capture*>(graph), cudaSuccess;
}

// --- kernels of torch's own: known by name, never run

void** __cudaRegisterFatBinary(void*) { return new void*; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
std::map<const void*, const char*>& kernels() {
  static auto* const all = new std::map<const void*, const char*>;
  return *all;
}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* found, const void* host) {
  return *found = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host)), cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t stream) {
  const auto it = kernels().find(host);
  // torch.cuda._sleep
  if (it != kernels().end() && std::strstr(it->second, "spin_kernel"))
    return queue_work(stream, [] { std::this_thread::sleep_for(kHeldUs); });
  return pretended_cuda_missing(it == kernels().end() ? "a kernel" : it->second);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* host, void**) {
  return cudaLaunchKernel(host, {}, {}, nullptr, 0, nullptr);
}
thread_local cudaStream_t launched_on;
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t stream) {
  return launched_on = stream, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = {1, 1, 1}, *shared = 0;
  return *static_cast<cudaStream_t*>(stream) = launched_on, cudaSuccess;
}

// --- the driver's functions that torch asks for by name

int has_primary_context(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int not_supported() { return 801; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(name) == "cuDevicePrimaryCtxGetState";
  *found =
      known ? reinterpret_cast<void*>(has_primary_context) : reinterpret_cast<void*>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
