// The part of CUDA C++ that csrc/kernels uses, for g++ and the executor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "executor.h"
#include "launch_limits.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx flexattn::simt::thread_index
#define blockIdx flexattn::simt::block_index
#define blockDim flexattn::simt::block_size
#define gridDim flexattn::simt::grid_size

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int shared_bytes) {
  const bool allowed = flexattn::simt::opt_in_to_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  return allowed ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = flexattn::simt::device_capability();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = capability % 10, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = flexattn::simt::kMultiprocessors, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = flexattn::simt::kL2Bytes, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

inline void __syncthreads() { flexattn::simt::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { flexattn::simt::warp_barrier(); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return flexattn::simt::from_lane("__shfl_xor_sync", value, flexattn::simt::lane() ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return flexattn::simt::from_lane("__shfl_sync", value, source);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const int lane = flexattn::simt::lane(), from = lane - static_cast<int>(by);
  return flexattn::simt::from_lane("__shfl_up_sync", value, from < 0 ? lane : from);
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const auto& all = flexattn::simt::exchange("__ballot_sync", &flag, sizeof flag);
  unsigned votes = 0;
  for (int i = 0; i < flexattn::simt::kLanes; ++i) votes |= static_cast<unsigned>(all[i][0] != 0) << i;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
[[noreturn]] inline void __trap() { flexattn::simt::fail("__trap"); }

using std::exp;
using std::exp2;
using std::fmax;
using std::isnan;
using std::log;
using std::log2;
using std::max;
using std::min;
using std::tanh;
