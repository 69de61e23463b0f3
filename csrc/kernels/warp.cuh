// What the 32 threads of a warp do together.
#pragma once

#include <cuda_runtime.h>

namespace flexattn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp_in_block() { return threadIdx.x / kWarp; }

// Butterflies: every lane ends with the result, and the order of additions is always the same.
template <typename A>
__device__ A warp_sum(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <typename A>
__device__ A warp_max(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace flexattn::cuda
