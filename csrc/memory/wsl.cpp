#include "memory/wsl.h"

#include <fstream>
#include <string>

namespace dataeff {

bool under_wsl(const char* version) {
  std::ifstream file(version);
  std::string text;
  std::getline(file, text);
  return text.find("microsoft") != std::string::npos || text.find("WSL") != std::string::npos;
}

}  // namespace dataeff
