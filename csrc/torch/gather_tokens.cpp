#include "flexattn/gather_tokens.h"

#include <torch/library.h>

#include <cstdint>
#include <limits>

#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;

// What both directions have in common; `source` is read and `result` written.
GatherTokensParams describe(const Tensor& source, const Tensor& dense_index, const Tensor& result, int64_t tokens) {
  GatherTokensParams params{};
  params.element_size = source.element_size();
  params.batch = source.size(0);
  params.tokens = tokens;
  params.selected = dense_index.size(1);
  params.channels = source.size(2);
  params.index = ints(dense_index);
  params.source = source.const_data_ptr();
  params.source_batch = source.stride(0);
  params.source_row = source.stride(1);
  params.result = result.mutable_data_ptr();
  return params;
}

Tensor gather_tokens(const Tensor& tokens, const Tensor& index) {
  const NvtxRange range("gather_tokens");
  Reasons reasons("gather_tokens");
  reasons.tensor("tokens", tokens, {-1, -1, -1}, kFloatingPoint, tokens.device());
  reasons.raise_if_any();
  const int64_t B = tokens.size(0), T = tokens.size(1), D = tokens.size(2);
  if (reasons.tensor("index", index, {B, -1}, kInt, tokens.device())) {
    reasons.values_within("index", index, -1, T - 1);
    if (reasons.ok()) reasons.distinct_in_rows("index", index, T);
  }
  reasons.raise_if_any();
  const Tensor rows = at::empty({B, index.size(1), D}, tokens.options());
  if (rows.numel() == 0) return rows;
  const Tensor dense_index = index.contiguous();
  const GatherTokensParams params = describe(tokens, dense_index, rows, T);
  FLEXATTN_LAUNCH(gather_tokens, params, tokens);
  return rows;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& index, int64_t num_tokens) {
  const NvtxRange range("gather_tokens_backward");
  Reasons reasons("gather_tokens_backward");
  reasons.tensor("grad", grad, {-1, -1, -1}, kFloatingPoint, grad.device());
  reasons.raise_if_any();
  const int64_t B = grad.size(0), M = grad.size(1), D = grad.size(2);
  reasons.unless(num_tokens >= 0 && num_tokens <= std::numeric_limits<int32_t>::max(), "num_tokens is ", num_tokens,
                 ", expected 0 to 2^31 - 1");
  if (reasons.tensor("index", index, {B, M}, kInt, grad.device()) && reasons.ok()) {
    reasons.values_within("index", index, -1, num_tokens - 1);
    if (reasons.ok()) reasons.distinct_in_rows("index", index, num_tokens);
  }
  reasons.raise_if_any();
  const Tensor grad_tokens = at::empty({B, num_tokens, D}, grad.options());
  if (grad_tokens.numel() == 0) return grad_tokens;
  const Tensor dense_index = index.contiguous();
  const GatherTokensParams params = describe(grad, dense_index, grad_tokens, num_tokens);
  FLEXATTN_LAUNCH(scatter_tokens, params, grad);
  return grad_tokens;
}

template <typename Library>
void register_kernels(Library& library) {
  library.impl("gather_tokens", &gather_tokens);
  library.impl("gather_tokens_backward", &gather_tokens_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  library.def("gather_tokens(Tensor tokens, Tensor index) -> Tensor");
  library.def("gather_tokens_backward(Tensor grad, Tensor index, SymInt num_tokens) -> Tensor");
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { register_kernels(library); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { register_kernels(library); }

}  // namespace flexattn::torch_binding
