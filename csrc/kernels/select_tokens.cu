// Margin, min-max, threshold, pool and resize: a block per map. Then the ordered compaction of what any row selects: a block
// per sample.

#include "flexattn/select_tokens.h"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The cells of one map: zero in the margin, and chosen where they exceed the threshold. A constant map gives 0 / 0 and one
// with a NaN has NaN for its extremes: neither is above any threshold.
template <typename A>
struct Grid {
  const A* map;         // [S, S]
  const int32_t* live;  // top, left, bottom, right
  int64_t side;         // S
  A low, range, scale, threshold;

  __device__ A value(int64_t cell) const {
    const int64_t y = cell / side, x = cell % side;
    return live[0] <= y && y < live[2] && live[1] <= x && x < live[3] ? map[cell] : A(0);
  }
  __device__ bool chosen(int64_t cell) const { return (value(cell) - low) / range * scale > threshold; }

  // Whether the adaptive window (row, column) of a pooled grid holds a chosen cell.
  __device__ bool chosen_in_window(int64_t row, int64_t column, int64_t pooled) const {
    for (int64_t y = row * side / pooled; y < ((row + 1) * side + pooled - 1) / pooled; ++y)
      for (int64_t x = column * side / pooled; x < ((column + 1) * side + pooled - 1) / pooled; ++x)
        if (chosen(y * side + x)) return true;
    return false;
  }
};

// Shared memory: an A per warp, then a bit per cell of the (pooled) grid.
FLEXATTN_HOST_DEVICE constexpr int64_t grid_words(int64_t side) { return words_for_bits(side * side); }

template <typename A>
__global__ void choose_tokens(SelectTokensParams p) {
  const int64_t S = p.lr_side, h = p.hr_side, side = p.pool_side ? p.pool_side : S;
  const int64_t item = blockIdx.x, picture = item % p.pictures, b = item / p.pictures / p.rows;  // item: over [B, R, I]
  Grid<A> grid{static_cast<const A*>(p.map) + item * S * S, p.live + (b * p.pictures + picture) * 4, S};
  A* scratch = shared_memory<A>();
  int32_t* cells = reinterpret_cast<int32_t*>(scratch + kWarps);

  A low = -minus_infinity<A>(), high = minus_infinity<A>();
  for (int64_t cell = threadIdx.x; cell < S * S; cell += kThreads) {
    low = -larger(-low, -grid.value(cell));
    high = larger(high, grid.value(cell));
  }
  grid.low = -block_max(-low, scratch);
  grid.range = block_max(high, scratch) - grid.low;
  grid.scale = static_cast<A>(p.scale);
  grid.threshold = static_cast<A>(p.threshold);

  // A warp writes the bits of 32 cells at a time.
  for (int64_t word = warp_in_block(); word < grid_words(side); word += kWarps) {
    const int64_t i = word * kBitsPerWord + lane();
    const unsigned bits = votes(i < side * side && (p.pool_side ? grid.chosen_in_window(i / side, i % side, side) : grid.chosen(i)));
    if (lane() == 0) cells[word] = static_cast<int32_t>(bits);
  }
  __syncthreads();

  // Nearest cell in torch's arithmetic, which float32 rounding is a part of.
  const float ratio = __fdiv_rn(static_cast<float>(side), static_cast<float>(h));
  const auto source = [&](int64_t i) {
    const int64_t at = static_cast<int64_t>(floorf(__fmul_rn(static_cast<float>(i), ratio)));
    return at < side ? at : side - 1;
  };
  bool* mask = p.mask + item * h * h;
  for (int64_t t = threadIdx.x; t < h * h; t += kThreads) mask[t] = bit(cells, source(t / h) * side + source(t % h));
}

// index, count and row bits, 256 tokens at a time.
__global__ void compact_tokens(SelectTokensParams p) {
  const int64_t tokens = p.pictures * p.hr_side * p.hr_side, b = blockIdx.x, words = words_for_bits(tokens);
  const bool* masks = p.mask + b * p.rows * tokens;  // [R, tokens]
  int32_t* index = p.index + b * tokens;
  int* scratch = shared_memory<int>();
  int64_t count = 0;
  for (int64_t t0 = 0; t0 < tokens; t0 += kThreads) {
    const int64_t t = t0 + threadIdx.x;
    bool any = false;
    for (int64_t r = 0; t < tokens && r < p.rows && !any; ++r) any = masks[r * tokens + t];
    const Rank rank = block_rank(any, scratch);
    if (any) index[count + rank.before] = static_cast<int32_t>(t);
    count += rank.total;
  }
  for (int64_t i = count + threadIdx.x; i < tokens; i += kThreads) index[i] = -1;
  if (threadIdx.x == 0) p.count[b] = static_cast<int32_t>(count);
  __syncthreads();
  // A thread per word: bit m of row r says that the row selects index[m].
  for (int64_t i = threadIdx.x; i < p.rows * words; i += kThreads) {
    const int64_t r = i / words, first = i % words * kBitsPerWord;
    uint32_t word = 0;
    for (int64_t m = first; m < first + kBitsPerWord && m < count; ++m)
      word |= static_cast<uint32_t>(masks[r * tokens + index[m]]) << (m - first);
    p.row_bits[b * p.rows * words + i] = static_cast<int32_t>(word);
  }
}

template <typename A>
void choose(const SelectTokensParams& p, Stream stream) {
  const int64_t side = p.pool_side ? p.pool_side : p.lr_side;
  const size_t shared = kWarps * sizeof(A) + grid_words(side) * sizeof(int32_t);
  if (shared > kSharedBytes)
    throw std::runtime_error("flexattn_cuda: select_tokens: a grid of side " + std::to_string(side) + " is too large, 600 is possible");
  launch("select_tokens", choose_tokens<A>, p.batch * p.rows * p.pictures, kThreads, shared, stream, p);
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream stream) {
  params.dtype == DType::kFloat64 ? choose<double>(params, stream) : choose<float>(params, stream);
  launch("select_tokens (compaction)", compact_tokens, params.batch, kThreads, kWarps * sizeof(int), stream, params);
}

}  // namespace flexattn::cuda
