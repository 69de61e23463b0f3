// What the threads of a warp or a block compute together. Results never depend on which thread comes first.
#pragma once

#include "launch.cuh"
#include "numeric.cuh"

namespace flexattn::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp_in_block() { return threadIdx.x / kWarp; }
__device__ inline int warps_in_block() { return blockDim.x / kWarp; }

// Bit i: whether the flag of lane i is set.
__device__ inline unsigned votes(bool flag) { return __ballot_sync(kAllLanes, flag); }

// Butterflies: every lane ends with the same result. With a NaN the max is NaN.
template <typename A>
__device__ A warp_sum(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <typename A>
__device__ A warp_max(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <typename Bits>
__device__ Bits warp_or(Bits bits) {
  for (int step = kWarp / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, step);
  return bits;
}

// scratch: an element per warp.
template <typename A>
__device__ A block_max(A x, A* scratch) {
  x = warp_max(x);
  if (lane() == 0) scratch[warp_in_block()] = x;
  __syncthreads();
  for (int w = 0; w < warps_in_block(); ++w) x = max_or_nan(x, scratch[w]);
  __syncthreads();
  return x;
}

// How many threads before this one have the flag set, and how many in the whole block.
struct Rank {
  int before, total;
};
__device__ inline Rank block_rank(bool flag, int* scratch) {
  const unsigned set = votes(flag);
  if (lane() == 0) scratch[warp_in_block()] = __popc(set);
  __syncthreads();
  Rank rank{__popc(set & ((1u << lane()) - 1)), 0};
  for (int w = 0; w < warps_in_block(); ++w) {
    if (w < warp_in_block()) rank.before += scratch[w];
    rank.total += scratch[w];
  }
  __syncthreads();
  return rank;
}

}  // namespace flexattn::cuda
