// The smallest test frame that serves: tests register themselves, checks throw.
//
// A new file tests/native/test_<stem>.cpp is compiled with the core's sources and run by
// test_native.py under each sanitizer; nothing else need be edited.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace native {

struct Registration {
  Registration(const char* file, const char* name, void (*body)());
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* what, const char* file, int line) {
  if (a == b) return;
  std::ostringstream text;
  text << what << ": " << a << " is not " << b;
  fail(file, line, text.str());
}

}  // namespace native

#define TEST(name)                                                          \
  static void name();                                                       \
  static const native::Registration register_##name(__FILE__, #name, name); \
  static void name()

#define CHECK(condition) \
  if (!(condition)) native::fail(__FILE__, __LINE__, #condition)

#define CHECK_EQ(a, b) native::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)

#define CHECK_THROWS(expression, Type)                                                  \
  do {                                                                                  \
    bool thrown = false;                                                                \
    try {                                                                               \
      (void)(expression);                                                               \
    } catch (const Type&) {                                                             \
      thrown = true;                                                                    \
    }                                                                                   \
    if (!thrown) native::fail(__FILE__, __LINE__, #expression " did not throw " #Type); \
  } while (false)
