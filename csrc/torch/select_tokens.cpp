#include "flexattn/select_tokens.h"

#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;

constexpr at::ScalarType kMapDtypes[] = {at::kFloat, at::kDouble};

// The side of a square grid with so many cells; 0 if there is none.
int64_t side_of_square(int64_t cells) {
  const int64_t side = std::llround(std::sqrt(static_cast<double>(cells)));
  return side * side == cells ? side : 0;
}

struct Options {
  int64_t hr_side, pool_side;
  double scale, threshold;
};

void check(const Tensor& attention_map, const Tensor& valid_rect, const Options& options) {
  Reasons reasons("select_tokens");
  const at::Device device = attention_map.device();
  reasons.tensor("attention_map", attention_map, {-1, -1, -1, -1}, kMapDtypes, device);
  reasons.raise_if_any();
  const int64_t B = attention_map.size(0), I = attention_map.size(2), cells = attention_map.size(3);
  const int64_t S = side_of_square(cells), h = options.hr_side;
  reasons.unless(S > 0, "attention_map has ", cells, " cells per image, expected a square number");
  reasons.tensor("valid_rect", valid_rect, {B, I, 4}, kInt, device);
  reasons.unless(h > 0, "hr_side is ", h, ", expected at least 1");
  reasons.unless(options.pool_side >= 0 && options.pool_side <= S, "pool_side is ", options.pool_side,
                 ", expected 0 (no pooling) to ", S);
  reasons.unless(I * h * h < (int64_t{1} << 31), "the HR grids of ", I, " images have ", I * h * h,
                 " tokens, expected fewer than 2^31");
  if (reasons.ok()) reasons.values_within("valid_rect", valid_rect, 0, S);
  reasons.raise_if_any();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_tokens(const Tensor& attention_map, const Tensor& valid_rect,
                                                         int64_t hr_side, double scale, double threshold,
                                                         int64_t pool_side) {
  const NvtxRange range("select_tokens");
  check(attention_map, valid_rect, {hr_side, pool_side, scale, threshold});
  const int64_t B = attention_map.size(0), R = attention_map.size(1), I = attention_map.size(2);
  const int64_t tokens = I * hr_side * hr_side;
  const auto options = attention_map.options();
  const Tensor mask = at::empty({B, R, I, hr_side * hr_side}, options.dtype(at::kBool));
  const Tensor index = at::empty({B, tokens}, options.dtype(at::kInt));
  const Tensor count = at::empty({B}, options.dtype(at::kInt));
  const Tensor row_bits = at::empty({B, R, words_for_bits(tokens)}, options.dtype(at::kInt));
  const Tensor dense_map = attention_map.contiguous(), dense_rect = valid_rect.contiguous();

  SelectTokensParams params{};
  params.dtype = dtype_of(attention_map);
  params.map = dense_map.const_data_ptr();
  params.valid_rect = ints(dense_rect);
  params.batch = B;
  params.rows = R;
  params.images = I;
  params.lr_side = side_of_square(attention_map.size(3));
  params.hr_side = hr_side;
  params.pool_side = pool_side;
  params.scale = scale;
  params.threshold = threshold;
  params.mask = mask.mutable_data_ptr<bool>();
  params.index = mutable_ints(index);
  params.count = mutable_ints(count);
  params.row_bits = mutable_ints(row_bits);
  FLEXATTN_LAUNCH(select_tokens, params, attention_map);
  return {mask, index, count, row_bits};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  library.def(
      "select_tokens(Tensor attention_map, Tensor valid_rect, SymInt hr_side, float scale, float threshold, "
      "SymInt pool_side=0) -> (Tensor mask, Tensor index, Tensor count, Tensor row_bits)");
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { library.impl("select_tokens", &select_tokens); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { library.impl("select_tokens", &select_tokens); }

}  // namespace flexattn::torch_binding
