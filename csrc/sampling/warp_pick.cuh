// Choosing k of the entries [begin, end) of a column by the 32 lanes of a warp: the choices of
// `Picks` (of weighted ones up to the last bit of the logarithm), where one thread would be long at
// it. All lanes call each function together, with the same arguments.
//
// Weights may lie in host memory, where a read costs a microsecond or two and the unit of cost is
// the request, at most 128 bytes of one aligned line. A column of n weights is read as whole lines,
// 4 KB under way at a time: one pass is n / 16 requests and n / 512 waits. Passes over a column:
//   counting                     until there are enough positive weights, as a rule one wait
//   choosing k, each once        2: the k smallest keys, then whose they are; 1 if k is all
//   choosing k with replacement  1 for the sum, then one for every 32 draws
// A column of up to 496 weights stays in shared memory from the first pass to the last.
#pragma once

#include <cmath>
#include <cstdint>

#include "sampling/random.h"

namespace dataeff {

// Of columns without weights.
class WarpPicks {
 public:
  static constexpr bool kWeighs = false;
  static constexpr int kNumLanes = 32;

  static __device__ int lane() { return threadIdx.x % kNumLanes; }

  // Lanes draw 32 entries at once. An entry that was chosen before gives way to the last that was
  // up for choice, so lanes are settled one after another.
  static __device__ void distinct(const Stream& stream, int64_t begin, int64_t end, int64_t k,
                                  int64_t* chosen) {
    for (int64_t first = 0; first < k; first += kNumLanes) {
      const int64_t i = first + lane(), last = end - k + i;
      int64_t entry = begin + stream.below(i, last + 1 - begin);
      bool taken = false;
      for (int64_t j = 0; j < first; ++j) taken |= chosen[j] == entry;
      for (int j = 0; j < kNumLanes; ++j) {
        const int64_t settled = __shfl_sync(kAll, taken ? last : entry, j);
        if (j < lane()) taken |= settled == entry;
      }
      if (i < k) chosen[i] = taken ? last : entry;
      __syncwarp();  // the next draws look at these
    }
  }

 protected:
  static constexpr unsigned kAll = 0xffffffffu;
};

// Of columns with weights, by blocks of up to `kMaxThreads`.
class WeighingWarpPicks : public WarpPicks {
 public:
  static constexpr bool kWeighs = true;
  static constexpr int kMaxThreads = 256;

  static __device__ int64_t count_positive(const double* weight, int64_t begin, int64_t end,
                                           int64_t enough) {
    int64_t found = 0;
    WeighingWarpPicks().scan(weight, begin, end, [&](const Staged& staged) {
      each_entry(staged, [&](int64_t, double w) { found += __popc(ballot(w > 0)); });
      return found < enough;
    });
    return found;
  }

  __device__ int64_t distinct_weighted(const Stream& stream, const double* weight, int64_t begin,
                                       int64_t end, int64_t k, int64_t* chosen) {
    held_ = nullptr;
    const Limit limit =
        k < end - begin ? smallest_keys(stream, weight, begin, end, k, chosen) : Limit{INFINITY, k};
    int64_t num_chosen = 0, num_equal = 0;
    scan(weight, begin, end, [&](const Staged& staged) {
      each_entry(staged, [&](int64_t entry, double w) {
        const double key = key_of(stream, entry - begin, w);
        const bool equal = w > 0 && key == limit.key;
        const unsigned equals = ballot(equal);
        const bool below = w > 0 && key < limit.key;
        const bool take = below || (equal && num_equal + rank_in(equals) < limit.num_equal);
        const unsigned takers = ballot(take);
        if (take) chosen[num_chosen + rank_in(takers)] = entry;
        num_equal += __popc(equals);
        num_chosen += __popc(takers);
      });
      return num_chosen < k;
    });
    return num_chosen;
  }

  // The sums are made in the order of entries, like the host's: the same bits.
  __device__ int64_t weighted(const Stream& stream, const double* weight, int64_t begin,
                              int64_t end, int64_t k, int64_t* chosen) {
    held_ = nullptr;
    double total = 0;
    bool positive = false;
    scan(weight, begin, end, [&](const Staged& staged) {
      for (int64_t i = staged.begin; i < staged.end; ++i) {
        total += staged[i];
        positive |= staged[i] > 0;
      }
      return true;
    });
    if (!positive) return 0;
    for (int64_t first = 0; first < k; first += kNumLanes) {
      const int64_t draw = first + lane();
      const double level = fmin(stream.unit(draw) * total, nextafter(total, 0.0));
      int64_t entry = draw < k ? -1 : end;
      double sum = 0;
      scan(weight, begin, end, [&](const Staged& staged) {
        for (int64_t i = staged.begin; i < staged.end; ++i) {
          sum += staged[i];
          if (entry < 0 && sum > level) entry = i;
        }
        return ballot(entry < 0) != 0;
      });
      if (draw < k) chosen[draw] = entry < 0 ? end - 1 : entry;
    }
    return k;
  }

 private:
  static constexpr int kLoads = 16;  // that a lane has under way at once
  static constexpr int kStaged = kNumLanes * kLoads;
  static constexpr int kLineNbytes = 128;

  // The weights of entries [begin, end), in shared memory.
  struct Staged {
    const double* values;
    int64_t first;  // whose weight comes first there
    int64_t begin, end;

    __device__ double operator[](int64_t entry) const { return values[entry - first]; }
  };

  // What is kept of the keys: those below `key`, and the first `num_equal` of those equal to it.
  struct Limit {
    double key;
    int64_t num_equal;
  };

  static __device__ unsigned ballot(bool mine) { return __ballot_sync(kAll, mine); }

  // How many of the lanes before this one are among `lanes`.
  static __device__ int rank_in(unsigned lanes) { return __popc(lanes & ((1u << lane()) - 1)); }

  static __device__ double* staging() {
    __shared__ double staged[kMaxThreads / kNumLanes][kStaged];
    return staged[threadIdx.x / kNumLanes];
  }

  // Reads the weights of a line's first entry and those after it; 0 outside [begin, end).
  static __device__ void stage(const double* weight, int64_t first, int64_t begin, int64_t end) {
    double* const staged = staging();
    double loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t entry = first + i * kNumLanes + lane();
      loaded[i] = begin <= entry && entry < end ? weight[entry] : 0;
    }
    __syncwarp();  // all lanes are done with what was there
#pragma unroll
    for (int i = 0; i < kLoads; ++i) staged[i * kNumLanes + lane()] = loaded[i];
    __syncwarp();
  }

  // Calls body(staged) for the entries [begin, end), in order, until it returns false.
  template <typename Body>
  __device__ void scan(const double* weight, int64_t begin, int64_t end, const Body& body) {
    const uintptr_t in_line = reinterpret_cast<uintptr_t>(weight + begin) % kLineNbytes;
    int64_t first = begin - static_cast<int64_t>(in_line / sizeof(double));
    for (bool more = true; more && first < end; first += kStaged) {
      if (weight + first != held_) stage(weight, first, begin, end);
      held_ = weight + first;
      const int64_t last = first + kStaged;
      more = body(Staged{staging(), first, first < begin ? begin : first, last < end ? last : end});
    }
  }

  // Calls body(entry, weight) for an entry each in all lanes; those without one have weight 0.
  template <typename Body>
  static __device__ void each_entry(const Staged& staged, const Body& body) {
    for (int64_t first = staged.begin; first < staged.end; first += kNumLanes) {
      const int64_t entry = first + lane();
      body(entry, entry < staged.end ? staged[entry] : 0);
    }
  }

  // One piece of code for both passes, which must agree to the last bit.
  static __device__ __noinline__ double key_of(const Stream& stream, int64_t i, double weight) {
    return -log(stream.unit(i)) / weight;
  }

  // The limit of the k smallest keys. `kept` has room for k, or for all if they are fewer: slot s
  // is lane s % 32's own, so that each lane knows the largest of its keys and the warp finds the
  // largest of all by shuffles.
  __device__ Limit smallest_keys(const Stream& stream, const double* weight, int64_t begin,
                                 int64_t end, int64_t k, int64_t* kept) {
    int64_t size = 0, slot = 0;  // keys kept; where this lane's largest is
    double mine = -INFINITY, worst = INFINITY;
    const auto see = [&](double key, int64_t at) {
      if (key > mine) mine = key, slot = at;
    };
    const auto put = [&](double key) {
      if (size < k) {
        if (size % kNumLanes == lane()) {
          kept[size] = __double_as_longlong(key);
          see(key, size);
        }
        ++size;
      } else if (__ffs(ballot(mine == worst)) - 1 == lane()) {
        kept[slot] = __double_as_longlong(key);
        mine = -INFINITY;
        for (int64_t s = lane(); s < k; s += kNumLanes) see(__longlong_as_double(kept[s]), s);
      }
      if (size == k) worst = largest(mine);
    };
    scan(weight, begin, end, [&](const Staged& staged) {
      each_entry(staged, [&](int64_t entry, double w) {
        const double key = key_of(stream, entry - begin, w);
        for (unsigned left = ballot(w > 0 && (size < k || key < worst)); left; left &= left - 1) {
          const double one = __shfl_sync(kAll, key, __ffs(left) - 1);
          if (size < k || one < worst) put(one);
        }
      });
      return true;
    });
    __syncwarp();  // choices go to where other lanes have their keys, and a ballot orders no writes
    if (size < k) return {INFINITY, k};
    int64_t num_below = 0;
    for (int64_t first = 0; first < k; first += kNumLanes) {
      const int64_t s = first + lane();
      num_below += __popc(ballot(s < k && __longlong_as_double(kept[s]) < worst));
    }
    __syncwarp();  // and had them when they were read
    return {worst, k - num_below};
  }

  static __device__ double largest(double value) {
    for (int apart = kNumLanes / 2; apart > 0; apart /= 2)
      value = fmax(value, __shfl_xor_sync(kAll, value, apart));
    return value;
  }

  const double* held_ = nullptr;  // the address of what is staged of this run
};

}  // namespace dataeff
