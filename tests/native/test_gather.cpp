#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "gather/copy_row.h"
#include "gather/stored_rows.h"

using namespace dataeff;

namespace {

constexpr std::byte kSentinel{0xA5};
constexpr int64_t kMargin = 64;

// A table at an odd address, an index of both signs, and an output between sentinels.
struct Problem {
  Problem(int64_t num_rows, int64_t row_nbytes, int64_t gap, int64_t num_index, int shift,
          unsigned seed)
      : random(seed),
        memory(num_rows * (row_nbytes + gap) + shift + 1),
        table{memory.data() + shift, num_rows, row_nbytes, row_nbytes + gap},
        index(num_index),
        out(num_index * row_nbytes + 2 * kMargin + shift, kSentinel),
        shift(shift) {
    for (auto& byte : memory) byte = static_cast<std::byte>(random());
    for (auto& i : index) i = static_cast<int64_t>(random() % (2 * num_rows)) - num_rows;
  }
  std::byte* rows() { return out.data() + kMargin + shift; }
  const std::byte* row(int64_t i) const {
    const int64_t at = index[i] < 0 ? index[i] + table.num_rows : index[i];
    return table.data + at * table.row_stride;
  }
  RowIndex row_index() const { return {index.data(), static_cast<int64_t>(index.size()), 8}; }
  void check_sentinels() const {
    for (int64_t i = 0; i < kMargin; ++i) CHECK(out[i] == kSentinel);
    for (size_t i = out.size() - kMargin; i < out.size(); ++i) CHECK(out[i] == kSentinel);
  }

  std::mt19937 random;
  std::vector<std::byte> memory;
  RowTable table;
  std::vector<int64_t> index;
  std::vector<std::byte> out;
  int shift;
};

void check_gather(Problem& problem, int num_threads) {
  gather_cpu(problem.table, problem.row_index(), problem.rows(), num_threads);
  const int64_t nbytes = problem.table.row_nbytes;
  for (size_t i = 0; i < problem.index.size(); ++i) {
    CHECK(std::memcmp(problem.rows() + i * nbytes, problem.row(i), nbytes) == 0);
  }
  problem.check_sentinels();
}

template <typename Copy>
void check_copy(const Copy& copy, int64_t nbytes) {
  std::vector<std::byte> from(nbytes + 64), to(nbytes + 2 * kMargin + 64);
  for (int64_t i = 0; i < nbytes + 64; ++i) from[i] = static_cast<std::byte>(i * 37 + i / 64);
  for (int shift : {0, 1, 16, 63}) {
    std::fill(to.begin(), to.end(), kSentinel);
    const std::byte* source = from.data() + (shift * 5) % 64;
    std::byte* target = to.data() + kMargin + shift;
    copy(target, source, source);
    stream_fence();
    CHECK(std::memcmp(target, source, nbytes) == 0);
    CHECK(std::all_of(to.data(), target, [](std::byte b) { return b == kSentinel; }));
    CHECK(std::all_of(target + nbytes, to.data() + to.size(),
                      [](std::byte b) { return b == kSentinel; }));
  }
}

}  // namespace

// Also those that the gather takes on other processors.
TEST(every_way_to_copy_a_row) {
  for (int64_t nbytes = 1; nbytes <= 1100; nbytes += nbytes < 330 ? 1 : 7) {
    check_copy(AnyCopy{nbytes}, nbytes);
    check_copy(HeadCopy{nbytes}, nbytes);
#if DATAEFF_HAS_WIDE
    if (wide_vectors()) check_copy(LineCopy<StoredLine>{nbytes}, nbytes);
    if (wide_vectors()) check_copy(LineCopy<StreamedLine>{nbytes}, nbytes);
    if (line_wide_vectors()) check_copy(LineCopy<LineStreamedAtOnce>{nbytes}, nbytes);
#endif
  }
}

TEST(every_width_address_and_stride) {
  for (int64_t row_nbytes : {0, 1, 2, 3, 4, 8, 12, 16, 48, 100, 256, 4100}) {
    for (int64_t gap : {0, 5, 16}) {
      for (int shift : {0, 1, 8}) {
        Problem problem(37, row_nbytes, gap, 300, shift, 1);
        for (int num_threads : {1, 4}) check_gather(problem, num_threads);
      }
    }
  }
}

// Of which later rows are fetched, whole or their first lines.
TEST(tables_past_the_second_cache) {
  for (int64_t row_nbytes : {64, 65, 100, 128, 192, 1000, 1024}) {
    for (int shift : {0, 1}) {
      Problem problem((2 << 20) / row_nbytes, row_nbytes, shift, 300, shift, 6);
      for (int num_threads : {1, 2}) check_gather(problem, num_threads);
    }
  }
}

// Outputs past 32 MiB, whole lines of which are written around the caches.
TEST(streamed_outputs) {
  for (int64_t row_nbytes : {64, 192, 520, 4100}) {
    for (int shift : {0, 1, 40}) {
      Problem problem(37, row_nbytes, 16, (33 << 20) / row_nbytes, shift, 5);
      check_gather(problem, 3);
    }
  }
}

TEST(rows_are_widened_as_element_by_element) {
  for (int format = 0; format < 4; ++format) {
    for (int64_t size : {1, 7, 8, 77}) {
      const auto rows = static_cast<RowFormat>(format);
      Problem problem(60, size * code_nbytes(rows), 0, 200, 0, 6);
      std::vector<float> scales(60);
      for (float& scale : scales) scale = static_cast<float>(problem.random()) * 0x1p-40f;
      const bool scaled = code_nbytes(rows) == 1;
      std::vector<uint32_t> out(200 * size);
      gather_decoded_cpu(problem.table, {rows, Element::kFloat32, scaled ? scales.data() : nullptr},
                         problem.row_index(), reinterpret_cast<std::byte*>(out.data()), 2);
      with_format(rows, [&]<typename Rows>(Rows) {
        for (int64_t i = 0; i < 200 * size; ++i) {
          const std::byte* row = problem.row(i / size);
          const float scale = scales[(row - problem.table.data) / problem.table.row_stride];
          typename Rows::Code code;
          std::memcpy(&code, row + i % size * sizeof(code), sizeof(code));
          const float expected = decode<Rows, Float32Element>(code, scale);
          CHECK_EQ(out[i], bits_as<uint32_t>(expected));
        }
      });
    }
  }
}

TEST(narrow_indices_and_none) {
  Problem problem(50, 24, 0, 200, 0, 2);
  std::vector<int32_t> narrow(problem.index.begin(), problem.index.end());
  gather_cpu(problem.table, {narrow.data(), 200, 4}, problem.rows(), 2);
  for (int i = 0; i < 200; ++i) {
    CHECK(std::memcmp(problem.rows() + i * 24, problem.row(i), 24) == 0);
  }
  gather_cpu(problem.table, {nullptr, 0, 8}, nullptr, 2);
}

TEST(a_wrong_index_writes_nothing) {
  for (int64_t wrong : {int64_t{37}, int64_t{-38}, INT64_MAX, INT64_MIN}) {
    Problem problem(37, 16, 0, 5000, 0, 3);
    problem.index[4321] = wrong;
    CHECK_THROWS(gather_cpu(problem.table, problem.row_index(), problem.rows(), 4),
                 std::out_of_range);
    for (std::byte byte : problem.out) CHECK(byte == kSentinel);
    const auto before = problem.memory;
    CHECK_THROWS(scatter_cpu(problem.table, problem.row_index(), problem.rows(), 4),
                 std::out_of_range);
    CHECK(problem.memory == before);
  }
}

TEST(scattering_keeps_the_later_row) {
  for (int num_threads : {1, 4}) {
    Problem problem(11, 20, 3, 4000, 1, 4);
    for (auto& byte : problem.out) byte = static_cast<std::byte>(problem.random());
    auto expected = problem.memory;
    for (int64_t i = 0; i < 4000; ++i) {
      std::memcpy(expected.data() + (problem.row(i) - problem.memory.data()),
                  problem.rows() + i * 20, 20);
    }
    scatter_cpu(problem.table, problem.row_index(), problem.rows(), num_threads);
    CHECK(problem.memory == expected);
  }
}

TEST(callers_at_once) {
  std::vector<std::thread> callers;
  std::atomic<int> num_failed{0};
  for (unsigned seed = 0; seed < 4; ++seed) {
    callers.emplace_back([&, seed] {
      try {
        Problem problem(100, 64, 0, 3000, 0, seed);
        for (int round = 0; round < 10; ++round) check_gather(problem, 3);
      } catch (const std::exception&) {
        ++num_failed;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(num_failed.load(), 0);
}
