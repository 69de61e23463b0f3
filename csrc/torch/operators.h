// The operators as C++ functions of tensors; library.cpp registers them. Meaning of the arguments:
// csrc/include/flexattn.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "flexattn/hierarchical_attention.h"

namespace flexattn::torch_binding {

using OptionalTensor = std::optional<at::Tensor>;

// Who sees what: common to both passes of attention.
struct AttentionArguments {
  at::Tensor kv_start, kv_len;
  OptionalTensor key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from, hr_rows, hr_row_bits, alpha;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_tokens(const at::Tensor& map, const at::Tensor& live,
                                                                         int64_t hr_side, double scale,
                                                                         double threshold, int64_t pool_side);
at::Tensor gather_tokens(const at::Tensor& tokens, const at::Tensor& index);
at::Tensor gather_tokens_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_tokens);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> assign_slots(
    const at::Tensor& index, const at::Tensor& count, at::Tensor& table, at::Tensor& next_free, int64_t capacity);
void write_hr_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin,
                 const at::Tensor& slots, at::Tensor& k_pool, at::Tensor& v_pool);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hierarchical_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionArguments& arguments,
    const OptionalTensor& map_ranges, int64_t map_size, bool map_over_all, double scale);
// Pointers, sizes and strides of the large tensors, unchecked; null pointers where there is no pool.
AttentionInputs attention_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const OptionalTensor& k_hr, const OptionalTensor& v_hr, double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> hierarchical_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const AttentionArguments& arguments, const at::Tensor& lse, const at::Tensor& lse_seq, double scale);

}  // namespace flexattn::torch_binding
