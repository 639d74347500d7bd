#include <random>
#include <vector>

#include "check.h"
#include "storage/crc32c.h"

TEST(the_instruction_and_the_tables_agree_at_every_address) {
  std::mt19937 random(3);
  std::vector<unsigned char> data(40'000);
  for (auto& byte : data) byte = random();
  for (size_t start = 0; start < 9; ++start) {
    for (size_t nbytes : {0, 1, 7, 8, 9, 4096, 12'287, 12'288, 12'289, 39'991}) {
      const auto* first = data.data() + start;
      CHECK_EQ(dataeff::crc32c(first, nbytes, 5), dataeff::crc32c_by_table(first, nbytes, 5));
    }
  }
}
