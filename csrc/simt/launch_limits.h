// What a GPU refuses to launch.
#pragma once

#include <cstddef>
#include <string>

#include "executor.h"

namespace flexattn::simt {

// 10 * major + minor of the GPU that the executor stands for: FLEXATTN_CAPABILITY, or 90, the newest that the kernels
// know.
int device_capability();

// Of that GPU. A V100 has 80; with fewer, small test calls are cut into chunks of more than the smallest size.
constexpr int kMultiprocessors = 8;

// A V100 has 6 MB; with less, small test calls are cut into groups of several heads and of one.
constexpr int kL2Bytes = 256 * 1024;

// Let a kernel have more dynamic shared memory than kSharedBytes from now on. False if a block of the GPU has less.
bool opt_in_to_shared_bytes(const void* kernel, int bytes);

// Why a launch is refused; empty if it is not.
std::string refused_launch(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes);

}  // namespace flexattn::simt
