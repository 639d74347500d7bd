// Where the rows of a stored table are: which file, at which byte.
#pragma once

#include <cstdint>
#include <vector>

namespace dataeff {

// One open file; the descriptor stays the caller's.
struct RowFile {
  int fd;
  int64_t nbytes;  // its size when it was opened
};

// `num_rows` rows in a row, dealt in extents of `rows_per_extent` over `files` by turns: extent e
// is the (e / F)th of file e % F. Rows begin at byte `offset` of each file and are packed.
struct RowSegment {
  int64_t num_rows;
  int64_t rows_per_extent;
  int64_t offset;
  std::vector<RowFile> files;
};

// A place in one of a layout's files, as one number that orders by file, then by byte.
class RowPlace {
 public:
  static constexpr int kOffsetBits = 48;
  RowPlace(int file, int64_t offset)
      : packed_(static_cast<uint64_t>(file) << kOffsetBits | static_cast<uint64_t>(offset)) {}
  int file() const { return static_cast<int>(packed_ >> kOffsetBits); }
  int64_t offset() const { return static_cast<int64_t>(packed_ & ((1ull << kOffsetBits) - 1)); }
  auto operator<=>(const RowPlace&) const = default;

 private:
  uint64_t packed_;
};

// Segments one after the other.
class RowLayout {
 public:
  // Throws std::invalid_argument when a segment has no file or no extent, a file is too short for
  // its rows, or there are more files or bytes than a RowPlace can name.
  RowLayout(std::vector<RowSegment> segments, int64_t row_nbytes);

  // `row` is in [0, num_rows()).
  RowPlace place(int64_t row) const;

  int64_t num_rows() const { return num_rows_; }
  int64_t row_nbytes() const { return row_nbytes_; }
  const std::vector<RowFile>& files() const { return files_; }

 private:
  struct Placed {
    RowSegment segment;
    int64_t first_row;
    int first_file;
  };

  void add(RowSegment segment);

  const int64_t row_nbytes_;
  int64_t num_rows_ = 0;
  std::vector<Placed> segments_;
  std::vector<RowFile> files_;
};

}  // namespace dataeff
