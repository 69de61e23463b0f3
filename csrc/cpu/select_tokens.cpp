// Margin, min-max, threshold, pool, resize, compaction: section 4.2 of the paper, as the released code computes it.

#include "flexattn/select_tokens.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace flexattn::cpu {
namespace {

// The cells of the S x S grid that one map chooses.
template <typename A>
void choose_cells(const SelectTokensParams& p, const A* map, const int32_t* valid_rect, std::vector<uint8_t>& cells) {
  const int64_t S = p.lr_side;
  const auto value = [&](int64_t y, int64_t x) {
    const bool inside = valid_rect[0] <= y && y < valid_rect[2] && valid_rect[1] <= x && x < valid_rect[3];
    return inside ? map[y * S + x] : A(0);
  };
  A low = std::numeric_limits<A>::infinity(), high = -low;
  bool has_nan = false;
  for (int64_t y = 0; y < S; ++y)
    for (int64_t x = 0; x < S; ++x) {
      const A a = value(y, x);
      has_nan |= a != a;
      low = std::min(low, a);
      high = std::max(high, a);
    }
  const A range = high - low, scale = static_cast<A>(p.scale), threshold = static_cast<A>(p.threshold);
  cells.assign(S * S, 0);
  if (has_nan) return;
  for (int64_t y = 0; y < S; ++y)  // a constant map gives 0 / 0, which is above no threshold
    for (int64_t x = 0; x < S; ++x) cells[y * S + x] = (value(y, x) - low) / range * scale > threshold;
}

// Adaptive max-pool S x S -> P x P.
void pool_cells(int64_t S, int64_t P, std::vector<uint8_t>& cells) {
  std::vector<uint8_t> pooled(P * P, 0);
  for (int64_t i = 0; i < P; ++i)
    for (int64_t j = 0; j < P; ++j)
      for (int64_t y = i * S / P; y < ((i + 1) * S + P - 1) / P; ++y)
        for (int64_t x = j * S / P; x < ((j + 1) * S + P - 1) / P; ++x) pooled[i * P + j] |= cells[y * S + x];
  cells.swap(pooled);
}

// For each row or column of the HR grid, the nearest one of a grid of `side`, as torch computes it in float32.
std::vector<int64_t> nearest_cells(int64_t side, int64_t hr_side) {
  const float ratio = static_cast<float>(side) / static_cast<float>(hr_side);
  std::vector<int64_t> nearest(hr_side);
  for (int64_t i = 0; i < hr_side; ++i)
    nearest[i] = std::min<int64_t>(std::floor(static_cast<float>(i) * ratio), side - 1);
  return nearest;
}

// index, count and row_bits of sample b, from its masks.
void compact_tokens(const SelectTokensParams& p, int64_t b) {
  const int64_t tokens = p.images * p.hr_side * p.hr_side, words = words_for_bits(tokens);
  const bool* masks = p.mask + b * p.rows * tokens;  // [R, tokens]
  int32_t* index = p.index + b * tokens;
  int32_t* bits = p.row_bits + b * p.rows * words;
  std::fill_n(index, tokens, -1);
  std::fill_n(bits, p.rows * words, 0);
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    bool any = false;
    for (int64_t r = 0; r < p.rows && !any; ++r) any = masks[r * tokens + t];
    if (!any) continue;
    for (int64_t r = 0; r < p.rows; ++r)
      if (masks[r * tokens + t])
        bits[r * words + count / kBitsPerWord] |= static_cast<int32_t>(1u << (count % kBitsPerWord));
    index[count++] = static_cast<int32_t>(t);
  }
  p.count[b] = static_cast<int32_t>(count);
}

template <typename A>
void select_sample(const SelectTokensParams& p, int64_t b) {
  const int64_t S = p.lr_side, h = p.hr_side, side = p.pool_side ? p.pool_side : S, maps = p.rows * p.images;
  const std::vector<int64_t> nearest = nearest_cells(side, h);
  std::vector<uint8_t> cells;
  for (int64_t item = b * maps; item < (b + 1) * maps; ++item) {  // over [B, R, I]
    const int64_t image = item % p.images;
    choose_cells(p, static_cast<const A*>(p.map) + item * S * S, p.valid_rect + (b * p.images + image) * 4, cells);
    if (p.pool_side) pool_cells(S, side, cells);
    bool* mask = p.mask + item * h * h;
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 0; x < h; ++x) mask[y * h + x] = cells[nearest[y] * side + nearest[x]];
  }
  compact_tokens(p, b);
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream) {
  at::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      params.dtype == DType::kFloat64 ? select_sample<double>(params, b) : select_sample<float>(params, b);
  });
}

}  // namespace flexattn::cpu
