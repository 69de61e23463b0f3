// Kernels with planted faults, which the executor must catch, and one without.

#include <string>

#include "launch.cuh"
#include "warp.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread hands its number to the next one through shared memory; without the barrier the next
// may read too early.
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

// Block 0 reads what block 1 reads and then overwrites.
__global__ void blocks_read_one_place(int32_t* out) {
  if (threadIdx.x == 0) out[1 - blockIdx.x] = out[0] + 1;
}

// Both warps read a number and the first overwrites it, ordered after its own reads only.
__global__ void forget_a_reader(int32_t* out) {
  int32_t* number = shared_memory<int32_t>();
  if (threadIdx.x == 0) *number = 1;
  __syncthreads();
  out[threadIdx.x] = *number;
  __syncwarp();
  if (threadIdx.x == 0) *number = 2;
}

// 16 bytes, and two of them.
__global__ void overlap(int32_t* out) {
  unsigned char* bytes = shared_memory<unsigned char>();
  if (threadIdx.x == 0) *reinterpret_cast<uint16_t*>(bytes + 14) = 1;
  if (threadIdx.x == 1) *reinterpret_cast<uint4*>(bytes) = uint4{};
  out[threadIdx.x] = 0;
}

// No fault: a byte each.
__global__ void write_bytes(unsigned char* out) { out[threadIdx.x] = static_cast<unsigned char>(threadIdx.x); }

// No fault: these are two launches, the second of which has what all blocks of the first wrote.
__global__ void write_number_of_block(int32_t* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int32_t>(blockIdx.x) + 1;
}
__global__ void add_halves(int32_t* out) { out[threadIdx.x] += out[blockDim.x + threadIdx.x]; }

__global__ void read_past_shared(int32_t* out) {
  const int32_t* numbers = shared_memory<int32_t>();
  out[threadIdx.x] = numbers[kThreads + threadIdx.x];
}

// Two kernels: a launch lets one of them have more shared memory.
template <bool opts_in>
__global__ void do_nothing() {}

__global__ void read_past_global(int32_t* out) { out[threadIdx.x] = out[kThreads + threadIdx.x]; }

// out must show NaN: nothing was written to shared memory.
__global__ void read_unwritten(int32_t* out) { out[threadIdx.x] = shared_memory<int32_t>()[threadIdx.x]; }

// A launch past flexattn::cuda::launch, which opts in to what it needs.
void launch_as_is(const std::string& name, dim3 grid, dim3 block, size_t shared_bytes) {
  simt::launch(name.c_str(), reinterpret_cast<const void*>(do_nothing<false>), grid, block, shared_bytes,
               do_nothing<false>);
}

}  // namespace

void run_fault(const std::string& fault, int32_t* data) {
  const size_t bytes = kThreads * sizeof(int32_t);
  if (fault == "none") launch("none", pass_on, 1, kThreads, bytes, nullptr, data, true);
  if (fault == "race") launch("race", pass_on, 1, kThreads, bytes, nullptr, data, false);
  if (fault == "reuse") launch("reuse", reuse_too_early, 1, kThreads, bytes, nullptr, data);
  if (fault == "barrier") launch("barrier", barrier_for_some, 1, kThreads, 0, nullptr, data);
  if (fault == "shuffle") launch("shuffle", shuffle_for_some, 1, kThreads, 0, nullptr, data);
  if (fault == "blocks") launch("blocks", blocks_write_one_place, 2, kThreads, 0, nullptr, data);
  if (fault == "reader") launch("reader", forget_a_reader, 1, kThreads, bytes, nullptr, data);
  if (fault == "overlap") launch("overlap", overlap, 1, kThreads, bytes, nullptr, data);
  if (fault == "readers of blocks") launch("readers of blocks", blocks_read_one_place, 2, kThreads, 0, nullptr, data);
  if (fault == "none, bytes")
    launch("none, bytes", write_bytes, 1, kThreads, 0, nullptr, reinterpret_cast<unsigned char*>(data));
  if (fault == "none, launches") {
    launch("none, launches", write_number_of_block, 2, kThreads / 2, 0, nullptr, data);
    launch("none, launches", add_halves, 1, kThreads / 2, 0, nullptr, data);
  }
  if (fault == "shared") launch("shared", read_past_shared, 1, kThreads, bytes, nullptr, data);
  if (fault == "global") launch("global", read_past_global, 1, kThreads, 0, nullptr, data);
  if (fault == "shared bytes") launch("shared bytes", do_nothing<true>, 1, kThreads, data[0], nullptr);
  if (fault == "no opt-in") launch_as_is(fault, dim3{1}, dim3{kThreads}, kSharedBytes + 16);
  if (fault == "threads") launch_as_is(fault, dim3{1}, dim3{1024 + 32}, 0);
  if (fault == "grid x") launch_as_is(fault, dim3{1u << 31}, dim3{kThreads}, 0);
  if (fault == "grid y") launch_as_is(fault, dim3{1, 1 << 16}, dim3{kThreads}, 0);
  if (fault == "grid z") launch_as_is(fault, dim3{1, 1, 1 << 16}, dim3{kThreads}, 0);
  if (fault == "blocks beyond 32 bits")
    launch(fault.c_str(), do_nothing<false>, (int64_t{1} << 32) + 1, kThreads, 0, nullptr);
  if (fault == "unwritten") launch("unwritten", read_unwritten, 1, kThreads, bytes, nullptr, data);
}

}  // namespace flexattn::cuda
