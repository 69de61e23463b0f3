// Kernels with planted faults, which the executor must catch, and one without.

#include <string>

#include "launch.cuh"
#include "warp.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread hands its number to the next one through shared memory; without the barrier the next may read too early.
__global__ void pass_on(int32_t* out, bool barrier) {
  int32_t* numbers = shared_memory<int32_t>();
  numbers[threadIdx.x] = static_cast<int32_t>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads];
}

// A double buffer with one buffer: the second round writes what some still read in the first.
__global__ void reuse_too_early(int32_t* out) {
  int32_t* numbers = shared_memory<int32_t>();
  int32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    numbers[threadIdx.x] = static_cast<int32_t>(threadIdx.x) + round;
    __syncthreads();
    sum += numbers[(threadIdx.x + 33) % kThreads];
  }
  out[threadIdx.x] = sum;
}

__global__ void barrier_for_some(int32_t* out) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void shuffle_for_some(int32_t* out) {
  int32_t x = static_cast<int32_t>(threadIdx.x);
  if (lane() < 8) x = __shfl_xor_sync(kAllLanes, x, 1);
  out[threadIdx.x] = x;
}

__global__ void blocks_write_one_place(int32_t* out) {
  if (threadIdx.x == 0) out[0] = static_cast<int32_t>(blockIdx.x);
}

__global__ void read_past_shared(int32_t* out) {
  const int32_t* numbers = shared_memory<int32_t>();
  out[threadIdx.x] = numbers[kThreads + threadIdx.x];
}

__global__ void read_past_global(int32_t* out) { out[threadIdx.x] = out[kThreads + threadIdx.x]; }

// out must show NaN: nothing was written to shared memory.
__global__ void read_unwritten(int32_t* out) { out[threadIdx.x] = shared_memory<int32_t>()[threadIdx.x]; }

}  // namespace

void run_fault(const std::string& fault, int32_t* data) {
  const size_t bytes = kThreads * sizeof(int32_t);
  if (fault == "none") launch("none", pass_on, 1, kThreads, bytes, nullptr, data, true);
  if (fault == "race") launch("race", pass_on, 1, kThreads, bytes, nullptr, data, false);
  if (fault == "reuse") launch("reuse", reuse_too_early, 1, kThreads, bytes, nullptr, data);
  if (fault == "barrier") launch("barrier", barrier_for_some, 1, kThreads, 0, nullptr, data);
  if (fault == "shuffle") launch("shuffle", shuffle_for_some, 1, kThreads, 0, nullptr, data);
  if (fault == "blocks") launch("blocks", blocks_write_one_place, 2, kThreads, 0, nullptr, data);
  if (fault == "shared") launch("shared", read_past_shared, 1, kThreads, bytes, nullptr, data);
  if (fault == "global") launch("global", read_past_global, 1, kThreads, 0, nullptr, data);
  if (fault == "unwritten") launch("unwritten", read_unwritten, 1, kThreads, bytes, nullptr, data);
}

}  // namespace flexattn::cuda
