// Exceptions of the core and what Python sees of them: std::invalid_argument is ValueError,
// std::out_of_range is IndexError, std::runtime_error is RuntimeError, OsError is OSError,
// EndOfFile is EOFError.
#pragma once

#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

namespace dataeff {

// A failed system call: `code` is its errno, `what()` says what was attempted and on what.
class OsError : public std::runtime_error {
 public:
  OsError(int code, const std::string& what, std::string path = "")
      : std::runtime_error(what), code_(code), path_(std::move(path)) {}
  int code() const { return code_; }
  const std::string& path() const { return path_; }

 private:
  int code_;
  std::string path_;
};

// A read beyond the last byte of a file, which has no errno.
class EndOfFile : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Thrown by every CUDA entry point of a core that was compiled without nvcc.
[[noreturn]] inline void throw_no_cuda() {
  throw std::runtime_error(
      "dataeff was built without CUDA: install nvcc (`dataeff doctor` says how) and reinstall "
      "dataeff with DATAEFF_CUDA=1");
}

}  // namespace dataeff
