// Runs the tests of the files whose stems are given, or of all: `native_tests test_engine`.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

#include "check.h"

namespace native {
namespace {

struct Test {
  std::string stem;
  const char* name;
  void (*body)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

bool run(const Test& test) {
  std::printf("%s.%s ", test.stem.c_str(), test.name);
  std::fflush(stdout);
  try {
    test.body();
  } catch (const std::exception& e) {
    std::printf("FAILED\n  %s\n", e.what());
    return false;
  }
  std::printf("ok\n");
  return true;
}

}  // namespace

Registration::Registration(const char* file, const char* name, void (*body)()) {
  tests().push_back({std::filesystem::path(file).stem(), name, body});
}

}  // namespace native

int main(int argc, char** argv) {
  int num_run = 0, num_failed = 0;
  for (const native::Test& test : native::tests()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= test.stem == argv[i];
    if (!wanted) continue;
    ++num_run;
    num_failed += !native::run(test);
  }
  std::printf("%d run, %d failed\n", num_run, num_failed);
  return num_failed > 0 || num_run == 0;
}
