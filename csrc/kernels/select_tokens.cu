// Margin, min-max, threshold, pool and resize in one kernel, then the ordered compaction of what any row selects.

#include "flexattn/select_tokens.h"
#include "launch.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Inclusive sum over the threads of a block; `sums` holds kWarps ints.
__device__ int block_inclusive_sum(int x, int* sums) {
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, step);
    if (lane() >= step) x += other;
  }
  if (lane() == kWarp - 1) sums[warp_in_block()] = x;
  __syncthreads();
  for (int w = 0; w < warp_in_block(); ++w) x += sums[w];
  __syncthreads();
  return x;
}

// A block per map: mask [h*h] of one (sample, row, picture).
template <typename A>
__global__ void choose_tokens(SelectTokensParams p) {
  const int64_t S = p.lr_side, h = p.hr_side, side = p.pool_side ? p.pool_side : S;
  const int64_t item = blockIdx.x, picture = item % p.pictures, b = item / p.pictures / p.rows;
  const A* map = static_cast<const A*>(p.map) + item * S * S;
  const int32_t* live = p.live + (b * p.pictures + picture) * 4;
  const auto value = [&](int64_t cell) {
    const int64_t y = cell / S, x = cell % S;
    return live[0] <= y && y < live[2] && live[1] <= x && x < live[3] ? map[cell] : A(0);
  };
  __shared__ A lows[kWarps], highs[kWarps];
  __shared__ int not_a_number;
  if (threadIdx.x == 0) not_a_number = 0;
  __syncthreads();
  A low = static_cast<A>(INFINITY), high = -low;
  for (int64_t cell = threadIdx.x; cell < S * S; cell += kThreads) {
    const A a = value(cell);
    if (a != a) not_a_number = 1;  // every writer writes the same
    low = a < low ? a : low;
    high = a > high ? a : high;
  }
  low = -warp_max(-low);
  high = warp_max(high);
  if (lane() == 0) lows[warp_in_block()] = low, highs[warp_in_block()] = high;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    low = lows[w] < low ? lows[w] : low;
    high = highs[w] > high ? highs[w] : high;
  }
  const A range = high - low, scale = static_cast<A>(p.scale), threshold = static_cast<A>(p.threshold);
  // A constant map gives 0 / 0, which is above no threshold.
  const auto chosen = [&](int64_t cell) { return !not_a_number && (value(cell) - low) / range * scale > threshold; };

  uint8_t* cells = shared_memory<uint8_t>();  // [side*side]
  for (int64_t i = threadIdx.x; i < side * side; i += kThreads) {
    bool any = false;
    if (p.pool_side) {
      const int64_t row = i / side, column = i % side;
      for (int64_t y = row * S / side; y < ((row + 1) * S + side - 1) / side; ++y)
        for (int64_t x = column * S / side; x < ((column + 1) * S + side - 1) / side; ++x) any |= chosen(y * S + x);
    } else {
      any = chosen(i);
    }
    cells[i] = any;
  }
  __syncthreads();
  const float ratio = __fdiv_rn(static_cast<float>(side), static_cast<float>(h));
  const auto source = [&](int64_t i) {
    const int64_t at = static_cast<int64_t>(floorf(__fmul_rn(static_cast<float>(i), ratio)));
    return at < side ? at : side - 1;
  };
  bool* mask = p.mask + item * h * h;
  for (int64_t t = threadIdx.x; t < h * h; t += kThreads) mask[t] = cells[source(t / h) * side + source(t % h)];
}

// A block per sample: index, count and row bits, 256 tokens at a time.
__global__ void compact_tokens(SelectTokensParams p) {
  const int64_t tokens = p.pictures * p.hr_side * p.hr_side, b = blockIdx.x, words = words_for_bits(tokens);
  const bool* masks = p.mask + b * p.rows * tokens;
  int32_t* index = p.index + b * tokens;
  int32_t* bits = p.row_bits + b * p.rows * words;
  __shared__ int sums[kWarps];
  int64_t count = 0;
  for (int64_t t0 = 0; t0 < tokens; t0 += kThreads) {
    const int64_t t = t0 + threadIdx.x;
    bool any = false;
    for (int64_t r = 0; t < tokens && r < p.rows && !any; ++r) any = masks[r * tokens + t];
    const int rank = block_inclusive_sum(any, sums);
    if (any) index[count + rank - 1] = static_cast<int32_t>(t);
    if (threadIdx.x == kThreads - 1) sums[0] = rank;
    __syncthreads();
    count += sums[0];
    __syncthreads();
  }
  for (int64_t i = count + threadIdx.x; i < tokens; i += kThreads) index[i] = -1;
  if (threadIdx.x == 0) p.count[b] = static_cast<int32_t>(count);
  __syncthreads();
  // A thread per word: bit m of row r says that the row selects index[m].
  for (int64_t i = threadIdx.x; i < p.rows * words; i += kThreads) {
    const int64_t r = i / words, m0 = i % words * kBitsPerWord;
    uint32_t word = 0;
    for (int64_t m = m0; m < m0 + kBitsPerWord && m < count; ++m)
      word |= static_cast<uint32_t>(masks[r * tokens + index[m]]) << (m - m0);
    bits[i] = static_cast<int32_t>(word);
  }
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream stream) {
  const int64_t side = params.pool_side ? params.pool_side : params.lr_side;
  const unsigned maps = static_cast<unsigned>(params.batch * params.rows * params.pictures);
  const auto choose = params.dtype == DType::kFloat64 ? choose_tokens<double> : choose_tokens<float>;
  launch("choose_tokens", choose, maps, kThreads, side * side, stream, params);
  launch("compact_tokens", compact_tokens, static_cast<unsigned>(params.batch), kThreads, 0, stream, params);
}

}  // namespace flexattn::cuda
