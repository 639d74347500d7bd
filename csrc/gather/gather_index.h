// Which lane of which warp reads and writes which bytes: the index arithmetic of the zero-copy
// gather, the same code on the device and in the host emulation that the tests run.
//
// Over PCIe the unit of cost is the request, at most 128 bytes of one aligned line. A warp's load
// makes one request per line that its lanes touch, so a line whose bytes are spread over two loads
// is paid for twice. Rows are therefore read as aligned 16-byte words, eight to a line, and laid
// over the lanes so that all words of a line fall to eight neighbouring lanes of one load. A row
// that begins in mid-line leaves the first lanes of its first line without work: the words at its
// end wrap round to them (the circular shift of PyTorch-Direct, arXiv 2101.07956, section 4.5, here
// in whole words and lines). Bytes that go elsewhere than their word's alignment are realigned when
// they are stored, where the memory is the GPU's own and narrow accesses are cheap.
//
// Rows that are also in the GPU's own memory are found by the same arithmetic at another address,
// so one kernel serves both tiers and a warp may read from both at once.
//
// Reading a whole word may touch up to 15 bytes before or after a row, never of another page.
#pragma once

#include <cstdint>

#include "gather/gather.h"
#include "host_device.h"

namespace dataeff {

inline constexpr int kWarpLanes = 32;
inline constexpr int kWordNbytes = 16;
inline constexpr int kLineNbytes = 128;
inline constexpr int kWordsPerLine = kLineNbytes / kWordNbytes;
// Up to this many words a row, as many whole rows as fit share one load of a warp. From here on
// rows follow each other without a gap, which leaves fewer lanes idle.
inline constexpr int kMaxPackedWords = 10;

struct Word {
  uint64_t low, high;
};

// How rows are laid over lanes.
struct RowLayout {
  int64_t slots_per_row;  // lanes that a row takes
  int64_t rows_per_load;  // whole rows in one load of a warp; 0 when rows run on from load to load
};

// The part of one word that is row data, and where it goes. Nothing is to be done when begin = end.
struct WordCopy {
  uintptr_t word = 0;   // address of the aligned word
  uintptr_t begin = 0;  // address of its first byte that belongs to the row
  uintptr_t end = 0;
  int64_t offset = 0;  // of the byte at `begin` in the rows laid back to back in output order
  bool readable = true;
  bool hot = false;
  bool first_lane = false;  // exactly one lane of each row has this set
  int64_t position = 0;     // of the row in the index
  int64_t row = 0;          // its number in the table
};

// One gather, as the lanes see it.
template <typename Id>
struct GatherTask {
  RowTable table;
  HotTable hot;
  RowLayout layout;
  const Id* ids;
  int64_t num_ids;
  const int64_t* places;
};

DATAEFF_HOST_DEVICE uint64_t lowest_bit(uint64_t value) { return value & (~value + 1); }

DATAEFF_HOST_DEVICE RowLayout row_layout(const RowTable& table, const HotTable& hot) {
  const uint64_t addresses =
      reinterpret_cast<uint64_t>(table.data) | static_cast<uint64_t>(table.row_stride) |
      reinterpret_cast<uint64_t>(hot.data) | static_cast<uint64_t>(hot.row_stride);
  const auto granule = static_cast<int64_t>(lowest_bit(addresses | kWordNbytes));
  const int64_t max_words = (2 * kWordNbytes - granule + table.row_nbytes - 1) / kWordNbytes;
  if (max_words <= kMaxPackedWords) return {max_words, kWarpLanes / max_words};
  return {(max_words + kWordsPerLine - 1) / kWordsPerLine * kWordsPerLine, 0};
}

// Loads that a warp makes for `num_rows` rows.
DATAEFF_HOST_DEVICE int64_t num_loads(const RowLayout& layout, int64_t num_rows) {
  if (layout.rows_per_load) return (num_rows + layout.rows_per_load - 1) / layout.rows_per_load;
  return (num_rows * layout.slots_per_row + kWarpLanes - 1) / kWarpLanes;
}

// The word of a row that lane number `slot` of its lanes reads. `row` is the row's address.
DATAEFF_HOST_DEVICE uintptr_t slot_word(const RowLayout& layout, uintptr_t row, int64_t slot) {
  const uintptr_t first = row / kWordNbytes * kWordNbytes;
  if (layout.rows_per_load) return first + slot * kWordNbytes;
  const uintptr_t line = row / kLineNbytes * kLineNbytes;
  const auto shift = static_cast<int64_t>((first - line) / kWordNbytes);
  const int64_t turned = slot < shift ? slot + layout.slots_per_row : slot;
  return line + turned * kWordNbytes;
}

// Where one lane works in one load.
struct LanePlace {
  int64_t position;  // of the row in the index, past its end where there is nothing to do
  int64_t slot;      // the lane's number among those of the row
};

// The places of one lane in the loads of its warp, every `loads_apart` from `load` on. The
// divisions are made once: a load then costs an addition before the index is read.
class LaneWalk {
 public:
  DATAEFF_HOST_DEVICE LaneWalk(const RowLayout& layout, int64_t load, int lane, int64_t loads_apart)
      : slots_per_row_(layout.slots_per_row) {
    const int64_t rows = layout.rows_per_load;
    const int64_t lanes = rows ? rows * slots_per_row_ : kWarpLanes;
    const int64_t first = load * lanes + lane, step = loads_apart * lanes;
    position_ = lane < lanes ? first / slots_per_row_ : kNowhere;
    slot_ = first % slots_per_row_;
    rows_apart_ = step / slots_per_row_;
    slots_apart_ = step % slots_per_row_;
  }

  DATAEFF_HOST_DEVICE LanePlace next() {
    const LanePlace place{position_, slot_};
    position_ += rows_apart_;
    slot_ += slots_apart_;
    if (slot_ >= slots_per_row_) {
      slot_ -= slots_per_row_;
      ++position_;
    }
    return place;
  }

 private:
  static constexpr int64_t kNowhere = int64_t{1} << 62;

  int64_t slots_per_row_, position_, slot_, rows_apart_, slots_apart_;
};

// What the index says of one row.
struct AskedRow {
  bool asked;     // the lane has a row
  bool readable;  // that is in the table
  int64_t row;    // its number, 0 where it is not readable
  int64_t place;  // of the row in the output
};

// The three steps to a word: the index, the hot rows' slots, the address. Apart, since each waits
// for memory, and a kernel that takes several words takes every step for all of them at once.
template <typename Id>
DATAEFF_HOST_DEVICE AskedRow asked_row(const GatherTask<Id>& task, int64_t position) {
  const bool asked = position < task.num_ids;
  const int64_t id = asked ? task.ids[position] : 0;
  const int64_t place = asked && task.places ? task.places[position] : position;
  const bool readable = asked && id >= -task.table.num_rows && id < task.table.num_rows;
  const int64_t row = id < 0 ? id + task.table.num_rows : id;
  return {asked, readable, readable ? row : 0, place};
}

// The slot of a row among the hot ones, negative when it is not there.
DATAEFF_HOST_DEVICE int64_t hot_slot(const HotTable& hot, const AskedRow& asked) {
  if (!asked.readable) return -1;
  if (hot.slots) return hot.slots[asked.row];
  return asked.row < hot.num_rows ? asked.row : -1;
}

template <typename Id>
DATAEFF_HOST_DEVICE WordCopy word_copy(const GatherTask<Id>& task, const LanePlace& lane,
                                       const AskedRow& asked, int64_t in_slot) {
  WordCopy copy;
  if (!asked.asked) return copy;
  copy.position = lane.position;
  copy.row = asked.row;
  // The lanes share out the output row of a wrong index too, which becomes zero.
  copy.readable = asked.readable;
  copy.first_lane = lane.slot == 0;
  copy.hot = in_slot >= 0;
  const uintptr_t row =
      copy.hot ? reinterpret_cast<uintptr_t>(task.hot.data) + in_slot * task.hot.row_stride
               : reinterpret_cast<uintptr_t>(task.table.data) + asked.row * task.table.row_stride;
  const uintptr_t row_end = row + task.table.row_nbytes;
  copy.word = slot_word(task.layout, row, lane.slot);
  copy.begin = copy.word < row ? row : copy.word;
  copy.end = copy.word + kWordNbytes < row_end ? copy.word + kWordNbytes : row_end;
  if (copy.end < copy.begin) copy.end = copy.begin;
  copy.offset = asked.place * task.table.row_nbytes + static_cast<int64_t>(copy.begin - row);
  return copy;
}

// The same for one lane of one load by itself.
template <typename Id>
DATAEFF_HOST_DEVICE WordCopy word_copy(const GatherTask<Id>& task, int64_t load, int lane) {
  const LanePlace place = LaneWalk(task.layout, load, lane, 0).next();
  const AskedRow asked = asked_row(task, place.position);
  return word_copy(task, place, asked, hot_slot(task.hot, asked));
}

// The bytes of `word` from address `from` on, which lies within it.
template <typename Unit>
DATAEFF_HOST_DEVICE Unit unit_of(const Word& word, uintptr_t from) {
  return static_cast<Unit>((from & 8 ? word.high : word.low) >> (from & 7) * 8);
}

template <typename Unit>
DATAEFF_HOST_DEVICE void store_units(const WordCopy& copy, const Word& word, uintptr_t out) {
  for (uintptr_t from = copy.begin; from < copy.end; from += sizeof(Unit))
    *reinterpret_cast<Unit*>(out + (from - copy.begin)) = unit_of<Unit>(word, from);
}

// Writes the row's part of a word with the widest store that both ends and the target allow.
struct StoreBytes {
  std::byte* out;

  // Rows that are copied have none.
  DATAEFF_HOST_DEVICE float scale_of(const WordCopy&) const { return 1.0f; }

  // `store_word` writes a whole aligned word.
  template <typename StoreWord>
  DATAEFF_HOST_DEVICE void operator()(const WordCopy& copy, const Word& word, float /*scale*/,
                                      const StoreWord& store_word) const {
    if (copy.begin == copy.end) return;
    const uintptr_t to = reinterpret_cast<uintptr_t>(out) + copy.offset;
    switch (lowest_bit(copy.begin | copy.end | to | kWordNbytes)) {
      case 16:
        return store_word(to, word);
      case 8:
        return store_units<uint64_t>(copy, word, to);
      case 4:
        return store_units<uint32_t>(copy, word, to);
      case 2:
        return store_units<uint16_t>(copy, word, to);
      default:
        return store_units<uint8_t>(copy, word, to);
    }
  }
};

}  // namespace dataeff
