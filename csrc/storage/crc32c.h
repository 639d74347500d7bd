// CRC32C (Castagnoli, the checksum of iSCSI and ext4), RFC 3720 appendix B.4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dataeff {

// The checksum of `nbytes` bytes; with the checksum of what came before as `crc`, that of both
// together. Uses the processor's CRC instruction where it has one.
uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc = 0);

// The same by tables alone.
uint32_t crc32c_by_table(const void* data, size_t nbytes, uint32_t crc = 0);

// Whether `crc32c` uses an instruction.
bool crc32c_in_hardware();

}  // namespace dataeff
