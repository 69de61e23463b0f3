// Kernels with planted faults, which the executor must catch, and one without.

#include <string>
#include <vector>

#include "flexattn/hierarchical_attention.h"
#include "flexattn/select_tokens.h"
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

__global__ void read_past_global(int32_t* out) { out[threadIdx.x] = out[kThreads + threadIdx.x]; }

// out must show NaN: nothing was written to shared memory.
__global__ void read_unwritten(int32_t* out) { out[threadIdx.x] = shared_memory<int32_t>()[threadIdx.x]; }

// What the host cannot see in a tensor on a GPU.
enum class BadRange {
  kMap,            // a map of an image whose range has more keys than map_size
  kBidirectional,  // bidirectional ranges that overlap
};

void attend_with_a_bad_range(BadRange bad, int64_t queries) {
  constexpr int64_t kKeys = 32, kDim = 64, kMapSize = 4;
  const std::vector<uint16_t> zeros(kKeys * kDim);  // float16
  std::vector<uint16_t> out(queries * kDim);
  std::vector<float> lse(queries), lse_seq(queries), map(kMapSize);
  const int32_t start = 0, length = kKeys, range[2] = {0, bad == BadRange::kMap ? 2 * kMapSize : kMapSize};
  const int32_t bidirectional[4] = {2, 9, 7, 12};
  AttentionForwardParams p{};
  p.in.dtype = DType::kFloat16;
  p.in.batch = p.in.heads = p.in.kv_heads = p.in.rows = 1;
  p.in.queries = queries, p.in.keys = kKeys, p.in.head_dim = kDim, p.in.scale = 1;
  p.in.q = p.in.k = p.in.v = zeros.data();
  p.in.q_strides = p.in.k_strides = p.in.v_strides = {kKeys * kDim, kKeys * kDim, kDim};
  p.in.kv_start = &start, p.in.kv_len = &length;
  if (bad == BadRange::kBidirectional) p.in.ranges = 2, p.in.bidirectional_ranges = bidirectional;
  p.images = 1, p.map_size = kMapSize, p.map_ranges = range;
  p.out = out.data(), p.lse = lse.data(), p.lse_seq = lse_seq.data(), p.map = map.data();
  std::vector<float> workspace(hierarchical_attention_workspace(p, nullptr) / sizeof(float));
  p.workspace = workspace.data();
  hierarchical_attention_forward(p, nullptr);
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
  if (fault == "map range, one query") attend_with_a_bad_range(BadRange::kMap, 1);
  if (fault == "map range, many queries") attend_with_a_bad_range(BadRange::kMap, 32);
  if (fault == "bidirectional ranges, one query") attend_with_a_bad_range(BadRange::kBidirectional, 1);
  if (fault == "bidirectional ranges, many queries") attend_with_a_bad_range(BadRange::kBidirectional, 32);
  if (fault.rfind("select ", 0) == 0) select_with_a_bad_value(fault.substr(7));
  if (fault == "unwritten") launch("unwritten", read_unwritten, 1, kThreads, bytes, nullptr, data);
}

}  // namespace flexattn::cuda
