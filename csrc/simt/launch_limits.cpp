#include "launch_limits.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>

namespace flexattn::simt {
namespace {

constexpr int kKilobyte = 1024;
constexpr int kSharedBytes = 48 * kKilobyte;  // without opting in
constexpr uint64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
constexpr uint64_t kMaxThreads = 1024, kMaxBlockZ = 64;

// Dynamic shared memory of a block that has opted in (CUDA C++ Programming Guide, technical specifications per compute
// capability).
int max_shared_bytes(int capability) {
  switch (capability) {
    case 70:
    case 72:
      return 96 * kKilobyte;
    case 75:
      return 64 * kKilobyte;
    case 80:
    case 87:
      return 163 * kKilobyte;
    case 86:
    case 89:
      return 99 * kKilobyte;
    case 90:
      return 227 * kKilobyte;
    default:
      return kSharedBytes;
  }
}

std::map<const void*, size_t> opted_in;  // bytes by kernel

std::string text(const dim3& size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

}  // namespace

int device_capability() {
  const char* wanted = std::getenv("FLEXATTN_CAPABILITY");
  return wanted ? std::atoi(wanted) : 90;
}

bool opt_in_to_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > max_shared_bytes(device_capability())) return false;
  opted_in[kernel] = bytes;
  return true;
}

std::string refused_launch(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes) {
  const auto out_of = [](uint64_t size, uint64_t max) { return size < 1 || size > max; };
  if (out_of(grid.x, kMaxGridX) || out_of(grid.y, kMaxGridYZ) || out_of(grid.z, kMaxGridYZ))
    return "a grid of " + text(grid) + " blocks";
  if (out_of(uint64_t{block.x} * block.y * block.z, kMaxThreads) || out_of(block.z, kMaxBlockZ))
    return "a block of " + text(block) + " threads";
  // An opt-in of another GPU, which FLEXATTN_CAPABILITY was before, does not count.
  const auto found = opted_in.find(kernel);
  const size_t asked = found == opted_in.end() ? 0 : found->second;
  const size_t allowed = std::min<size_t>(std::max<size_t>(kSharedBytes, asked), max_shared_bytes(device_capability()));
  if (shared_bytes > allowed)
    return std::to_string(shared_bytes) + " bytes of dynamic shared memory, of which it may have " +
           std::to_string(allowed);
  return "";
}

}  // namespace flexattn::simt
