// Three launches: choose_cells, a block per map: margin, min-max, threshold and pool; list_tokens, a block per sample:
// the ordered list of the HR tokens that any row selects; mark_rows, a warp per word of row_bits. HR tokens are resized
// from cells where they are asked for, so that no mask of them is stored.

#include "flexattn/select_tokens.h"

#include "bits.cuh"
#include "require.cuh"
#include "warp.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kMapThreads = 256;
constexpr int kListThreads = 512;
constexpr int kMarkThreads = 128;

// Traps unless the values of an image, a number in [B, I], are those that the interface allows.
__device__ void require_image(const SelectTokensParams& p, int64_t image) {
  const auto require_cells = [&](const char* what, const int32_t* grid, int64_t max_cells) {
    require(what, grid[0], 0, max_cells);
    require(what, grid[1], 0, grid[0] ? max_cells / grid[0] : max_cells);
  };
  const int32_t* lr = p.lr_grid + 2 * image;
  require_cells("select_tokens: lr_grid", lr, p.cells);
  require_cells("select_tokens: hr_grid", p.hr_grid + 2 * image, p.hr_tokens);
  for (int i = 0; p.pool_grid && i < 2; ++i)
    require("select_tokens: pool_grid", p.pool_grid[2 * image + i], lr[i] ? 1 : 0, lr[i]);
  for (int i = 0; p.valid_rect && i < 4; ++i)
    require("select_tokens: valid_rect", p.valid_rect[4 * image + i], 0, lr[i % 2]);
}

// The cells of one map: zero in the margin, chosen if above the threshold. A constant map gives 0 / 0, and one with a
// NaN has NaN for its min and max: neither is above any threshold.
template <typename A>
struct Map {
  const A* values;            // [C]
  const int32_t* valid_rect;  // null: no margin
  GridSize size;
  A low, range, scale, threshold;

  __device__ A value(int cell) const {
    if (!valid_rect) return values[cell];
    const int y = cell / size.cols, x = cell % size.cols;
    const bool inside = valid_rect[0] <= y && y < valid_rect[2] && valid_rect[1] <= x && x < valid_rect[3];
    return inside ? values[cell] : A(0);
  }
  __device__ bool chosen(int cell) const { return (value(cell) - low) / range * scale > threshold; }

  // Whether the adaptive window of a cell of the pooled grid holds a chosen cell.
  __device__ bool chosen_in_window(int cell, GridSize pooled) const {
    const Window rows = adaptive_window(cell / pooled.cols, size.rows, pooled.rows);
    const Window cols = adaptive_window(cell % pooled.cols, size.cols, pooled.cols);
    for (int y = rows.begin; y < rows.end; ++y)
      for (int x = cols.begin; x < cols.end; ++x)
        if (chosen(y * size.cols + x)) return true;
    return false;
  }
};

// Shared memory: an A per warp.
template <typename A>
__global__ void __launch_bounds__(kMapThreads) choose_cells(SelectTokensParams p) {
  A* scratch = shared_memory<A>();
  const int64_t item = blockIdx.x, image = item / p.images / p.rows * p.images + item % p.images;  // of [B, R, I]
  if (threadIdx.x == 0) require_image(p, image);
  __syncthreads();
  const SelectionGrids grids = grids_of(p, image);
  Map<A> map{static_cast<const A*>(p.map) + item * p.cells, p.valid_rect ? p.valid_rect + 4 * image : nullptr,
             grids.lr};
  A low = -minus_infinity<A>(), high = minus_infinity<A>();
  for (int cell = threadIdx.x; cell < grids.lr.cells(); cell += kMapThreads) {
    low = -max_or_nan(-low, -map.value(cell));
    high = max_or_nan(high, map.value(cell));
  }
  map.low = -block_max(-low, scratch);
  map.range = block_max(high, scratch) - map.low;
  map.scale = static_cast<A>(p.scale);
  map.threshold = static_cast<A>(p.threshold);

  // A warp writes the bits of 32 cells at a time.
  const int64_t words = words_for_bits(p.cells);
  for (int64_t word = warp_in_block(); word < words; word += kMapThreads / kWarp) {
    const int64_t i = word * kBitsPerWord + lane();
    const int cell = static_cast<int>(i);
    const unsigned bits =
        votes(i < grids.pooled.cells() && (p.pool_grid ? map.chosen_in_window(cell, grids.pooled) : map.chosen(cell)));
    if (lane() == 0) p.chosen[item * words + word] = static_cast<int32_t>(bits);
  }
}

// The nearest of `size` rows or columns, as torch computes it, float32 rounding included.
__device__ int nearest(int i, int size, int hr_size) {
  const float ratio = __fdiv_rn(static_cast<float>(size), static_cast<float>(hr_size));
  const int cell = static_cast<int>(floorf(__fmul_rn(static_cast<float>(i), ratio)));
  return cell < size ? cell : size - 1;
}

// Whether HR token t, a number in [I, T], of sample b lies in a cell whose bit is set in `cells`, [I, ceil(C / 32)].
__device__ bool selects(const SelectTokensParams& p, const int32_t* cells, int64_t b, int t) {
  const int room = static_cast<int>(p.hr_tokens), image = t / room, token = t % room;
  const SelectionGrids grids = grids_of(p, b * p.images + image);
  if (token >= grids.hr.cells()) return false;
  const int row = nearest(token / grids.hr.cols, grids.pooled.rows, grids.hr.rows);
  const int col = nearest(token % grids.hr.cols, grids.pooled.cols, grids.hr.cols);
  return bit(cells + image * words_for_bits(p.cells), row * grids.pooled.cols + col);
}

// any_chosen of sample b: a warp per word, its lanes share the rows.
__device__ void merge_rows(const SelectTokensParams& p, int64_t b) {
  const int64_t words = p.images * words_for_bits(p.cells);
  for (int64_t word = warp_in_block(); word < words; word += kListThreads / kWarp) {
    unsigned bits = 0;
    for (int64_t r = lane(); r < p.rows; r += kWarp)
      bits |= static_cast<unsigned>(p.chosen[(b * p.rows + r) * words + word]);
    bits = warp_or(bits);
    if (lane() == 0) p.any_chosen[b * words + word] = static_cast<int32_t>(bits);
  }
}

// Shared memory: an int per warp.
__global__ void __launch_bounds__(kListThreads, 2) list_tokens(SelectTokensParams p) {
  int* scratch = shared_memory<int>();
  const int64_t b = blockIdx.x, tokens = p.images * p.hr_tokens;
  merge_rows(p, b);
  __syncthreads();
  const int32_t* cells = p.any_chosen + b * p.images * words_for_bits(p.cells);
  int32_t* index = p.index + b * tokens;
  int count = 0;
  for (int64_t t0 = 0; t0 < tokens; t0 += kListThreads) {
    const int64_t t = t0 + threadIdx.x;
    const bool any = t < tokens && selects(p, cells, b, static_cast<int>(t));
    const Rank rank = block_rank(any, scratch);
    if (any) index[count + rank.before] = static_cast<int32_t>(t);
    count += rank.total;
  }
  for (int64_t i = count + threadIdx.x; i < tokens; i += kListThreads) index[i] = -1;
  if (threadIdx.x == 0) p.count[b] = count;
}

// A warp per word, a lane per bit: bit m of row r is set if the row selects index[m].
__global__ void __launch_bounds__(kMarkThreads) mark_rows(SelectTokensParams p) {
  const int64_t tokens = p.images * p.hr_tokens, words = words_for_bits(tokens);
  const int64_t word = static_cast<int64_t>(blockIdx.x) * (kMarkThreads / kWarp) + warp_in_block();
  if (word >= p.batch * p.rows * words) return;
  const int64_t row = word / words, b = row / p.rows, m = word % words * kBitsPerWord + lane();
  const int32_t* cells = p.chosen + row * p.images * words_for_bits(p.cells);
  const unsigned bits = votes(m < p.count[b] && selects(p, cells, b, p.index[b * tokens + m]));
  if (lane() == 0) p.row_bits[word] = static_cast<int32_t>(bits);
}

template <typename A>
void choose(const SelectTokensParams& p, Stream stream) {
  launch("select_tokens", choose_cells<A>, p.batch * p.rows * p.images, kMapThreads, kMapThreads / kWarp * sizeof(A),
         stream, p);
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream stream) {
  params.dtype == DType::kFloat64 ? choose<double>(params, stream) : choose<float>(params, stream);
  launch("select_tokens", list_tokens, params.batch, kListThreads, kListThreads / kWarp * sizeof(int), stream, params);
  const int64_t words = params.batch * params.rows * words_for_bits(params.images * params.hr_tokens);
  launch("select_tokens", mark_rows, blocks_for(words, kMarkThreads / kWarp), kMarkThreads, 0, stream, params);
}

}  // namespace flexattn::cuda
