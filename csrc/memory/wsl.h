#pragma once

namespace dataeff {

// Whether the kernel is that of the Windows Subsystem for Linux, as `version` tells it.
bool under_wsl(const char* version = "/proc/version");

}  // namespace dataeff
