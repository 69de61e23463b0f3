// The GPU that launches go to.
#pragma once

#include <cstdlib>

#include "launch.cuh"

namespace flexattn::cuda {

// 10 * major + minor. FLEXATTN_CAPABILITY lowers it, to run an older GPU's kernels on a newer GPU.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  const char* wanted = std::getenv("FLEXATTN_CAPABILITY");
  return wanted ? std::min(std::atoi(wanted), 10 * major + minor) : 10 * major + minor;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "number of multiprocessors");
  return count;
}

}  // namespace flexattn::cuda
