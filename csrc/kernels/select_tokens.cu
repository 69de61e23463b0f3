// One launch, a block per sample: margin, min-max, threshold, pool and resize of its maps one after the other, then the
// ordered compaction of what any row selects.

#include "flexattn/select_tokens.h"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// The cells of one map: zero in the margin, chosen if above the threshold. A constant map gives 0 / 0, and one with a
// NaN has NaN for its min and max: neither is above any threshold.
template <typename A>
struct Grid {
  const A* map;               // [S, S]
  const int32_t* valid_rect;  // top, left, bottom, right
  int side;                   // S
  A low, range, scale, threshold;

  __device__ A value(int cell) const {
    const int y = cell / side, x = cell % side;
    const bool inside = valid_rect[0] <= y && y < valid_rect[2] && valid_rect[1] <= x && x < valid_rect[3];
    return inside ? map[cell] : A(0);
  }
  __device__ bool chosen(int cell) const { return (value(cell) - low) / range * scale > threshold; }

  // Whether the adaptive window (row, column) of a pooled grid holds a chosen cell.
  __device__ bool chosen_in_window(int row, int column, int pooled) const {
    for (int y = row * side / pooled; y < ((row + 1) * side + pooled - 1) / pooled; ++y)
      for (int x = column * side / pooled; x < ((column + 1) * side + pooled - 1) / pooled; ++x)
        if (chosen(y * side + x)) return true;
    return false;
  }
};

FLEXATTN_HOST_DEVICE constexpr int64_t grid_words(int64_t side) { return words_for_bits(side * side); }

// The mask of one map, number `item` of [B, R, I]. scratch: an A per warp; cells: a bit per cell of the (pooled) grid.
template <typename A>
__device__ void choose_tokens(const SelectTokensParams& p, int64_t item, A* scratch, int32_t* cells) {
  const int S = static_cast<int>(p.lr_side), h = static_cast<int>(p.hr_side),
            side = p.pool_side ? static_cast<int>(p.pool_side) : S;
  const int64_t image = item % p.images, b = item / p.images / p.rows;
  Grid<A> grid{static_cast<const A*>(p.map) + item * S * S, p.valid_rect + (b * p.images + image) * 4, S};
  A low = -minus_infinity<A>(), high = minus_infinity<A>();
  for (int cell = threadIdx.x; cell < S * S; cell += kThreads) {
    low = -max_or_nan(-low, -grid.value(cell));
    high = max_or_nan(high, grid.value(cell));
  }
  grid.low = -block_max(-low, scratch);
  grid.range = block_max(high, scratch) - grid.low;
  grid.scale = static_cast<A>(p.scale);
  grid.threshold = static_cast<A>(p.threshold);

  // A warp writes the bits of 32 cells at a time.
  for (int word = warp_in_block(); word < grid_words(side); word += kWarps) {
    const int i = word * kBitsPerWord + lane();
    const unsigned bits =
        votes(i < side * side && (p.pool_side ? grid.chosen_in_window(i / side, i % side, side) : grid.chosen(i)));
    if (lane() == 0) cells[word] = static_cast<int32_t>(bits);
  }
  __syncthreads();

  // The nearest cell as torch computes it, float32 rounding included.
  const float ratio = __fdiv_rn(static_cast<float>(side), static_cast<float>(h));
  const auto nearest = [&](int i) {
    const int cell = static_cast<int>(floorf(__fmul_rn(static_cast<float>(i), ratio)));
    return cell < side ? cell : side - 1;
  };
  bool* mask = p.mask + item * h * h;
  for (int t = threadIdx.x; t < h * h; t += kThreads) mask[t] = bit(cells, nearest(t / h) * side + nearest(t % h));
  __syncthreads();  // the next map overwrites the cells, and compaction reads the masks
}

// index, count and row_bits of sample b. scratch: an int per warp.
__device__ void compact_tokens(const SelectTokensParams& p, int64_t b, int* scratch) {
  const int64_t tokens = p.images * p.hr_side * p.hr_side, words = words_for_bits(tokens);
  const bool* masks = p.mask + b * p.rows * tokens;  // [R, tokens]
  int32_t* index = p.index + b * tokens;
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
  // A warp per word, a lane per bit: bit m of row r is set if the row selects index[m].
  for (int64_t i = warp_in_block(); i < p.rows * words; i += kWarps) {
    const int64_t r = i / words, m = i % words * kBitsPerWord + lane();
    const unsigned bits = votes(m < count && masks[r * tokens + index[m]]);
    if (lane() == 0) p.row_bits[b * p.rows * words + i] = static_cast<int32_t>(bits);
  }
}

// Shared memory: an A per warp, then the bits of a grid.
template <typename A>
__global__ void __launch_bounds__(kThreads) select_sample(SelectTokensParams p) {
  A* scratch = shared_memory<A>();
  int32_t* cells = reinterpret_cast<int32_t*>(scratch + kWarps);
  const int64_t b = blockIdx.x, maps = p.rows * p.images;
  for (int64_t i = 0; i < maps; ++i) choose_tokens(p, b * maps + i, scratch, cells);
  compact_tokens(p, b, reinterpret_cast<int*>(scratch));
}

template <typename A>
void select(const SelectTokensParams& p, Stream stream) {
  const int64_t side = p.pool_side ? p.pool_side : p.lr_side;
  const size_t shared = kWarps * sizeof(A) + grid_words(side) * sizeof(int32_t);
  if (shared > kSharedBytes)
    throw std::runtime_error("flexattn_cuda: select_tokens: a grid of side " + std::to_string(side) +
                             " is too large, the max is 600");
  launch("select_tokens", select_sample<A>, p.batch, kThreads, shared, stream, p);
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream stream) {
  params.dtype == DType::kFloat64 ? select<double>(params, stream) : select<float>(params, stream);
}

}  // namespace flexattn::cuda
