// Margin, min-max, threshold, pool, resize, compaction: section 4.2 of the paper, as the released code computes it.

#include "flexattn/select_tokens.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bits.h"

namespace flexattn::cpu {
namespace {

using Cells = std::vector<uint8_t>;

// The cells of the LR grid that one map chooses. valid_rect: null for the whole grid.
template <typename A>
Cells choose_cells(const SelectTokensParams& p, const A* map, GridSize size, const int32_t* valid_rect) {
  const auto value = [&](int y, int x) {
    const bool inside =
        !valid_rect || (valid_rect[0] <= y && y < valid_rect[2] && valid_rect[1] <= x && x < valid_rect[3]);
    return inside ? map[y * size.cols + x] : A(0);
  };
  A low = std::numeric_limits<A>::infinity(), high = -low;
  bool has_nan = false;
  for (int y = 0; y < size.rows; ++y)
    for (int x = 0; x < size.cols; ++x) {
      const A a = value(y, x);
      has_nan |= a != a;
      low = std::min(low, a);
      high = std::max(high, a);
    }
  const A range = high - low, scale = static_cast<A>(p.scale), threshold = static_cast<A>(p.threshold);
  Cells cells(size.cells(), 0);
  if (has_nan) return cells;
  for (int y = 0; y < size.rows; ++y)  // a constant map gives 0 / 0, which is above no threshold
    for (int x = 0; x < size.cols; ++x) cells[y * size.cols + x] = (value(y, x) - low) / range * scale > threshold;
  return cells;
}

// Adaptive max-pool.
Cells pool_cells(const Cells& cells, GridSize from, GridSize to) {
  Cells pooled(to.cells(), 0);
  for (int cell = 0; cell < to.cells(); ++cell) {
    const Window rows = adaptive_window(cell / to.cols, from.rows, to.rows);
    const Window cols = adaptive_window(cell % to.cols, from.cols, to.cols);
    for (int y = rows.begin; y < rows.end; ++y)
      for (int x = cols.begin; x < cols.end; ++x) pooled[cell] |= cells[y * from.cols + x];
  }
  return pooled;
}

// `chosen` of one map, number `item` of [B, R, I]; its row's part of `any_chosen` too.
template <typename A>
void choose(const SelectTokensParams& p, int64_t item) {
  const int64_t image = item / p.images / p.rows * p.images + item % p.images, words = words_for_bits(p.cells);
  const SelectionGrids grids = grids_of(p, image);
  Cells cells = choose_cells(p, static_cast<const A*>(p.map) + item * p.cells, grids.lr,
                             p.valid_rect ? p.valid_rect + 4 * image : nullptr);
  if (p.pool_grid) cells = pool_cells(cells, grids.lr, grids.pooled);
  int32_t *chosen = p.chosen + item * words, *any_chosen = p.any_chosen + image * words;
  std::fill_n(chosen, words, 0);
  for (size_t i = 0; i < cells.size(); ++i)
    if (cells[i]) set_bit(chosen, i);
  for (int64_t word = 0; word < words; ++word) any_chosen[word] |= chosen[word];
}

// For each row or column of the HR grid, the nearest one of `size`, as torch computes it in float32.
std::vector<int> nearest_cells(int size, int hr_size) {
  const float ratio = static_cast<float>(size) / static_cast<float>(hr_size);
  std::vector<int> nearest(hr_size);
  for (int i = 0; i < hr_size; ++i)
    nearest[i] = std::min(static_cast<int>(std::floor(static_cast<float>(i) * ratio)), size - 1);
  return nearest;
}

// Adds the tokens of one image of sample b to index, count and row_bits.
void list_tokens(const SelectTokensParams& p, int64_t b, int64_t image) {
  const int64_t words = words_for_bits(p.cells), row_words = words_for_bits(p.images * p.hr_tokens);
  const SelectionGrids grids = grids_of(p, b * p.images + image);
  const std::vector<int> row_of = nearest_cells(grids.pooled.rows, grids.hr.rows);
  const std::vector<int> col_of = nearest_cells(grids.pooled.cols, grids.hr.cols);
  const int32_t* any_chosen = p.any_chosen + (b * p.images + image) * words;
  int32_t* index = p.index + b * p.images * p.hr_tokens;
  int32_t& count = p.count[b];
  for (int token = 0; token < grids.hr.cells(); ++token) {
    const int cell = row_of[token / grids.hr.cols] * grids.pooled.cols + col_of[token % grids.hr.cols];
    if (!bit(any_chosen, cell)) continue;
    for (int64_t row = b * p.rows; row < (b + 1) * p.rows; ++row)
      if (bit(p.chosen + (row * p.images + image) * words, cell)) set_bit(p.row_bits + row * row_words, count);
    index[count++] = static_cast<int32_t>(image * p.hr_tokens + token);
  }
}

template <typename A>
void select_sample(const SelectTokensParams& p, int64_t b) {
  const int64_t maps = p.rows * p.images, tokens = p.images * p.hr_tokens, words = words_for_bits(p.cells);
  std::fill_n(p.any_chosen + b * p.images * words, p.images * words, 0);
  std::fill_n(p.index + b * tokens, tokens, -1);
  std::fill_n(p.row_bits + b * p.rows * words_for_bits(tokens), p.rows * words_for_bits(tokens), 0);
  p.count[b] = 0;
  for (int64_t item = b * maps; item < (b + 1) * maps; ++item) choose<A>(p, item);
  for (int64_t image = 0; image < p.images; ++image) list_tokens(p, b, image);
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream) {
  at::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      params.dtype == DType::kFloat64 ? select_sample<double>(params, b) : select_sample<float>(params, b);
  });
}

}  // namespace flexattn::cpu
