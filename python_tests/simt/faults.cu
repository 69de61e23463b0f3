// Kernels with planted faults, which the executor must catch, and one without.

#include <string>
#include <vector>

#include "flexattn/select_tokens.h"
#include "launch.cuh"
#include "ptx.cuh"
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

// ------------------------------------------------------------------------------------------------- alignment

// A vector half its size past an address that is aligned for it.
template <typename T, typename Bytes>
__device__ T* askew(Bytes* bytes) {
  return reinterpret_cast<T*>(bytes + sizeof(T) / 2);
}
template <typename T>
__global__ void read_askew(unsigned char* data) {
  if (threadIdx.x == 0) *reinterpret_cast<T*>(data) = *askew<T>(shared_memory<unsigned char>());
}
template <typename T>
__global__ void write_askew(unsigned char* data) {
  if (threadIdx.x == 0) *askew<T>(data) = T{};
}

// Thread 0 copies 16 bytes from data + from to shared memory + to.
__global__ void copy_askew(const unsigned char* data, int to, int from) {
  if (threadIdx.x == 0) cp_async_16(shared_memory<unsigned char>() + to, data + from);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void load_matrix_askew(int32_t* out) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory<unsigned char>() + 8 * lane());
  out[threadIdx.x] = static_cast<int32_t>(r[0]);
}

// ------------------------------------------------------------------------------------- what orders memory in a warp

enum class By { kSyncWarp, kShuffle, kVote, kMma, kLdmatrix };

__device__ void meet(By by) {
  float d[8] = {};
  uint32_t a[4] = {}, b[2] = {};
  switch (by) {
    case By::kSyncWarp:
      __syncwarp();
      break;
    case By::kShuffle:
      warp_sum(1);
      break;
    case By::kVote:
      votes(true);
      break;
    case By::kMma:
      mma_m8n8k4(d, b, b);
      break;
    case By::kLdmatrix:
      ldmatrix_x4(a, shared_memory<unsigned char>() + 1024);
      break;
  }
}

// Each lane hands its number to the next one of its warp.
__global__ void pass_on_in_warp(int32_t* out, By by) {
  int32_t* numbers = shared_memory<int32_t>();
  numbers[lane()] = lane();
  meet(by);
  out[lane()] = numbers[(lane() + 1) % kWarp];
}

// Lanes write rows that ldmatrix hands to other lanes, or read them by it before they are overwritten.
__global__ void share_matrices(int32_t* out, bool write_first, bool order) {
  uint4* rows = shared_memory<uint4>();
  uint32_t r[4] = {};
  if (write_first) rows[lane()] = uint4{};
  if (write_first && order) __syncwarp();
  ldmatrix_x4(r, rows + lane());
  if (!write_first && order) __syncwarp();
  if (!write_first) rows[lane()] = uint4{};
  out[lane()] = static_cast<int32_t>(r[0]);
}

// --------------------------------------------------------------------------------------------- copies in flight

enum class Copy {
  kSound,
  kReadInFlight,   // before the wait
  kWriteInFlight,  // the same
  kNoBarrier,      // after the wait, but of another thread
  kTooEarly,       // starts while others may read what it overwrites
};

// Each thread copies 16 bytes and reads those of the next thread.
__global__ void copy_and_read(const int32_t* data, int32_t* out, Copy copy) {
  uint4* rows = shared_memory<uint4>();
  uint4* mine = rows + threadIdx.x;
  if (copy == Copy::kTooEarly) {
    *mine = uint4{};
    __syncthreads();
    out[threadIdx.x] = static_cast<int32_t>(rows[(threadIdx.x + 1) % kThreads].x);
  }
  cp_async_16(mine, data);
  cp_async_commit();
  if (copy == Copy::kReadInFlight) out[threadIdx.x] = static_cast<int32_t>(mine->x);
  if (copy == Copy::kWriteInFlight) *mine = uint4{};
  cp_async_wait<0>();
  if (copy != Copy::kNoBarrier) __syncthreads();
  out[threadIdx.x] = static_cast<int32_t>(rows[(threadIdx.x + 1) % kThreads].x);
}

// -------------------------------------------------------------------------------------------- limits of a launch

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

void run_misalignment(const std::string& fault, int32_t* data) {
  unsigned char* bytes = reinterpret_cast<unsigned char*>(data);
  const auto run = [&](const char* name, auto kernel, auto... arguments) {
    if (fault == name) launch(name, kernel, 1, kWarp, 1024, nullptr, arguments...);
  };
  run("read 16", read_askew<uint4>, bytes);
  run("read 8", read_askew<uint2>, bytes);
  run("read 4", read_askew<uint32_t>, bytes);
  run("write 16", write_askew<uint4>, bytes);
  run("write 8", write_askew<uint2>, bytes);
  run("write 2", write_askew<uint16_t>, bytes);
  run("copy, aligned", copy_askew, bytes, 32, 16);
  run("copy to", copy_askew, bytes, 8, 0);
  run("copy from", copy_askew, bytes, 0, 4);
  run("ldmatrix", load_matrix_askew, data);
}

void run_order(const std::string& fault, int32_t* data) {
  const auto run = [&](const char* name, auto kernel, auto... arguments) {
    if (fault == name) launch(name, kernel, 1, kWarp, 2048, nullptr, data, arguments...);
  };
  run("after __syncwarp", pass_on_in_warp, By::kSyncWarp);
  run("after a shuffle", pass_on_in_warp, By::kShuffle);
  run("after a vote", pass_on_in_warp, By::kVote);
  run("after an mma", pass_on_in_warp, By::kMma);
  run("after an ldmatrix", pass_on_in_warp, By::kLdmatrix);
  run("written, ordered, read by ldmatrix", share_matrices, true, true);
  run("written, read by ldmatrix", share_matrices, true, false);
  run("read by ldmatrix, ordered, written", share_matrices, false, true);
  run("read by ldmatrix, written", share_matrices, false, false);
}

void run_copy(const std::string& fault, const int32_t* data, int32_t* out) {
  const auto run = [&](const char* name, Copy copy) {
    if (fault == name) launch(name, copy_and_read, 1, kThreads, kThreads * sizeof(uint4), nullptr, data, out, copy);
  };
  run("copy", Copy::kSound);
  run("copy, read in flight", Copy::kReadInFlight);
  run("copy, write in flight", Copy::kWriteInFlight);
  run("copy, no barrier", Copy::kNoBarrier);
  run("copy, too early", Copy::kTooEarly);
}

// Grids of 3 x 3 for one image, one of whose values is out of range.
void select_with_a_bad_value(const std::string& argument) {
  const std::vector<float> map(9);
  std::vector<int32_t> lr_grid{3, 3}, hr_grid{3, 3}, pool_grid{3, 3}, valid_rect{0, 0, 3, 3};
  std::vector<int32_t> chosen(1), any_chosen(1), index(9), count(1), row_bits(1);
  if (argument == "lr_grid") lr_grid[1] = 4;
  if (argument == "hr_grid") hr_grid[0] = -1;
  if (argument == "pool_grid") pool_grid[1] = 0;
  if (argument == "valid_rect") valid_rect[3] = 4;
  SelectTokensParams p{};
  p.dtype = DType::kFloat32, p.map = map.data(), p.batch = p.rows = p.images = 1, p.cells = p.hr_tokens = 9;
  p.lr_grid = lr_grid.data(), p.hr_grid = hr_grid.data();
  p.pool_grid = pool_grid.data(), p.valid_rect = valid_rect.data();
  p.chosen = chosen.data(), p.any_chosen = any_chosen.data();
  p.index = index.data(), p.count = count.data(), p.row_bits = row_bits.data();
  select_tokens(p, nullptr);
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
  if (fault.rfind("select ", 0) == 0) select_with_a_bad_value(fault.substr(7));
  if (fault == "shared bytes") launch("shared bytes", do_nothing<true>, 1, kThreads, data[0], nullptr);
  if (fault == "no opt-in") launch_as_is(fault, dim3{1}, dim3{kThreads}, kSharedBytes + 16);
  if (fault == "threads") launch_as_is(fault, dim3{1}, dim3{1024 + 32}, 0);
  if (fault == "grid x") launch_as_is(fault, dim3{1u << 31}, dim3{kThreads}, 0);
  if (fault == "grid y") launch_as_is(fault, dim3{1, 1 << 16}, dim3{kThreads}, 0);
  if (fault == "grid z") launch_as_is(fault, dim3{1, 1, 1 << 16}, dim3{kThreads}, 0);
  if (fault == "blocks beyond 32 bits")
    launch(fault.c_str(), do_nothing<false>, (int64_t{1} << 32) + 1, kThreads, 0, nullptr);
  run_misalignment(fault, data);
  run_order(fault, data);
  const std::vector<int32_t> four(4, 4);
  run_copy(fault, four.data(), data);
  if (fault == "unwritten") launch("unwritten", read_unwritten, 1, kThreads, bytes, nullptr, data);
}

}  // namespace flexattn::cuda
