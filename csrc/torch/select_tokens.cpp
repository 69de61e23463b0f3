#include "flexattn/select_tokens.h"

#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;

constexpr at::ScalarType kMapDtypes[] = {at::kFloat, at::kDouble};
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;  // of a sample: they are numbered in int32

struct Grids {
  Tensor lr, hr;
  OptionalTensor pool, valid_rect;
};

// The values of one image, a number in [B, I].
void check_image(Reasons& reasons, const Grids& grids, int64_t image, int64_t cells, int64_t hr_tokens) {
  const auto check_size = [&](const char* name, const int32_t* size, int64_t max_cells, const char* of) {
    reasons.unless(size[0] >= 0 && size[1] >= 0 && int64_t{size[0]} * size[1] <= max_cells, name, " holds ", size[0],
                   " x ", size[1], ", expected at most ", of, ", which is ", max_cells);
  };
  const int32_t* lr = ints(grids.lr) + 2 * image;
  check_size("lr_grid", lr, cells, "the cells of attention_map");
  check_size("hr_grid", ints(grids.hr) + 2 * image, hr_tokens, "hr_tokens");
  if (grids.pool) {
    const int32_t* pool = ints(grids.pool) + 2 * image;
    const auto fits = [&](int i) { return (lr[i] > 0 ? 1 : 0) <= pool[i] && pool[i] <= lr[i]; };
    reasons.unless(fits(0) && fits(1), "pool_grid holds ", pool[0], " x ", pool[1], ", expected 1 x 1 to lr_grid's ",
                   lr[0], " x ", lr[1]);
  }
  if (grids.valid_rect) {
    const int32_t* rect = ints(grids.valid_rect) + 4 * image;
    const auto inside = [&](int i) { return 0 <= rect[i] && rect[i] <= lr[i % 2]; };
    reasons.unless(inside(0) && inside(1) && inside(2) && inside(3), "valid_rect holds ", rect[0], ", ", rect[1], ", ",
                   rect[2], ", ", rect[3], ", expected to lie in lr_grid's ", lr[0], " x ", lr[1]);
  }
}

void check(const Tensor& attention_map, const Grids& grids, int64_t hr_tokens) {
  Reasons reasons("select_tokens");
  const at::Device device = attention_map.device();
  reasons.tensor("attention_map", attention_map, {-1, -1, -1, -1}, kMapDtypes, device);
  reasons.raise_if_any();
  const int64_t B = attention_map.size(0), I = attention_map.size(2), cells = attention_map.size(3);
  reasons.unless(cells <= kMaxTokens, "attention_map has ", cells, " cells per image, expected fewer than 2^31");
  reasons.tensor("lr_grid", grids.lr, {B, I, 2}, kInt, device);
  reasons.tensor("hr_grid", grids.hr, {B, I, 2}, kInt, device);
  reasons.tensor("pool_grid", grids.pool, {B, I, 2}, kInt, device);
  reasons.tensor("valid_rect", grids.valid_rect, {B, I, 4}, kInt, device);
  reasons.unless(hr_tokens >= 0 && hr_tokens <= kMaxTokens / std::max<int64_t>(I, 1), "hr_tokens is ", hr_tokens,
                 ", expected 0 to ", kMaxTokens / std::max<int64_t>(I, 1), ", or the tokens of ", I,
                 " images could not be numbered");
  for (int64_t image = 0; readable(grids.lr) && reasons.ok() && image < B * I; ++image)
    check_image(reasons, grids, image, cells, hr_tokens);
  reasons.raise_if_any();
}

OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

std::tuple<Tensor, Tensor, Tensor> select_tokens(const Tensor& attention_map, const Tensor& lr_grid,
                                                 const Tensor& hr_grid, int64_t hr_tokens, double scale,
                                                 double threshold, const OptionalTensor& pool_grid,
                                                 const OptionalTensor& valid_rect) {
  const NvtxRange range("select_tokens");
  const Grids grids{lr_grid.contiguous(), hr_grid.contiguous(), dense(pool_grid), dense(valid_rect)};
  check(attention_map, grids, hr_tokens);
  const int64_t B = attention_map.size(0), R = attention_map.size(1), I = attention_map.size(2);
  const int64_t words = words_for_bits(attention_map.size(3)), tokens = I * hr_tokens;
  const auto options = attention_map.options().dtype(at::kInt);
  const Tensor dense_map = attention_map.contiguous();
  const Tensor chosen = at::empty({B, R, I, words}, options), any_chosen = at::empty({B, I, words}, options);
  const Tensor index = at::empty({B, tokens}, options), count = at::empty({B}, options);
  const Tensor row_bits = at::empty({B, R, words_for_bits(tokens)}, options);

  SelectTokensParams params{};
  params.dtype = dtype_of(attention_map);
  params.map = dense_map.const_data_ptr();
  params.lr_grid = ints(grids.lr);
  params.pool_grid = ints(grids.pool);
  params.hr_grid = ints(grids.hr);
  params.valid_rect = ints(grids.valid_rect);
  params.batch = B;
  params.rows = R;
  params.images = I;
  params.cells = attention_map.size(3);
  params.hr_tokens = hr_tokens;
  params.scale = scale;
  params.threshold = threshold;
  params.chosen = mutable_ints(chosen);
  params.any_chosen = mutable_ints(any_chosen);
  params.index = mutable_ints(index);
  params.count = mutable_ints(count);
  params.row_bits = mutable_ints(row_bits);
  FLEXATTN_LAUNCH(select_tokens, params, attention_map);
  return {index, count, row_bits};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  library.def(
      "select_tokens(Tensor attention_map, Tensor lr_grid, Tensor hr_grid, SymInt hr_tokens, float scale, "
      "float threshold, Tensor? pool_grid=None, Tensor? valid_rect=None) -> "
      "(Tensor index, Tensor count, Tensor row_bits)");
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { library.impl("select_tokens", &select_tokens); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { library.impl("select_tokens", &select_tokens); }

}  // namespace flexattn::torch_binding
