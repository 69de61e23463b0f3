// The GPU that launches go to.
#pragma once

#include <cstdlib>

#include "launch.cuh"

namespace flexattn::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// 10 * major + minor. FLEXATTN_CAPABILITY lowers it, to run an older GPU's kernels on a newer GPU.
inline int compute_capability() {
  const int capability =
      10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
  const char* wanted = std::getenv("FLEXATTN_CAPABILITY");
  return wanted ? std::min(std::atoi(wanted), capability) : capability;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

inline int64_t l2_bytes() { return device_attribute(cudaDevAttrL2CacheSize); }

}  // namespace flexattn::cuda
