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
void choose_cells(const SelectTokensParams& p, const A* map, const int32_t* live, std::vector<uint8_t>& cells) {
  const int64_t S = p.lr_side;
  const auto value = [&](int64_t y, int64_t x) {
    const bool inside = live[0] <= y && y < live[2] && live[1] <= x && x < live[3];
    return inside ? map[y * S + x] : A(0);
  };
  A lowest = std::numeric_limits<A>::infinity(), highest = -lowest;
  bool is_number = true;
  for (int64_t y = 0; y < S; ++y)
    for (int64_t x = 0; x < S; ++x) {
      const A a = value(y, x);
      is_number &= a == a;
      lowest = std::min(lowest, a);
      highest = std::max(highest, a);
    }
  const A range = highest - lowest, scale = static_cast<A>(p.scale), threshold = static_cast<A>(p.threshold);
  cells.assign(S * S, 0);
  if (!is_number) return;
  for (int64_t y = 0; y < S; ++y)  // a constant map gives 0 / 0, which is above no threshold
    for (int64_t x = 0; x < S; ++x) cells[y * S + x] = (value(y, x) - lowest) / range * scale > threshold;
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

template <typename A>
void select_sample(const SelectTokensParams& p, int64_t b) {
  const int64_t S = p.lr_side, h = p.hr_side, side = p.pool_side ? p.pool_side : S, tokens = p.images * h * h;
  const float ratio = static_cast<float>(side) / static_cast<float>(h);
  std::vector<int64_t> source(h);
  for (int64_t i = 0; i < h; ++i) source[i] = std::min<int64_t>(std::floor(static_cast<float>(i) * ratio), side - 1);

  bool* masks = p.mask + b * p.rows * tokens;
  std::vector<uint8_t> cells;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t i = 0; i < p.images; ++i) {
      const A* map = static_cast<const A*>(p.map) + ((b * p.rows + r) * p.images + i) * S * S;
      choose_cells(p, map, p.live + (b * p.images + i) * 4, cells);
      if (p.pool_side) pool_cells(S, side, cells);
      bool* mask = masks + r * tokens + i * h * h;
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < h; ++x) mask[y * h + x] = cells[source[y] * side + source[x]];
    }

  int32_t* index = p.index + b * tokens;
  int32_t* bits = p.row_bits + b * p.rows * words_for_bits(tokens);
  std::fill_n(index, tokens, -1);
  std::fill_n(bits, p.rows * words_for_bits(tokens), 0);
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    bool any = false;
    for (int64_t r = 0; r < p.rows && !any; ++r) any = masks[r * tokens + t];
    if (!any) continue;
    for (int64_t r = 0; r < p.rows; ++r)
      if (masks[r * tokens + t])
        bits[r * words_for_bits(tokens) + count / kBitsPerWord] |= static_cast<int32_t>(1u << (count % kBitsPerWord));
    index[count++] = static_cast<int32_t>(t);
  }
  p.count[b] = static_cast<int32_t>(count);
}

}  // namespace

void select_tokens(const SelectTokensParams& params, Stream) {
  at::parallel_for(0, params.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      params.dtype == DType::kFloat64 ? select_sample<double>(params, b) : select_sample<float>(params, b);
  });
}

}  // namespace flexattn::cpu
