// The arguments that both passes of hierarchical_attention share: read from a call, checked, described to the kernels.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/stack.h>

#include "checks.h"
#include "flexattn/hierarchical_attention.h"
#include "tensors.h"

namespace flexattn::torch_binding {

// Takes the arguments of a boxed call one by one, in the order of the schema.
class ArgumentReader {
 public:
  ArgumentReader(const torch::jit::Stack& stack, size_t count) : next_(stack.end() - count) {}

  at::Tensor tensor() { return (next_++)->toTensor(); }
  OptionalTensor optional_tensor() { return (next_++)->toOptional<at::Tensor>(); }
  int64_t integer() { return (next_++)->toInt(); }
  bool boolean() { return (next_++)->toBool(); }
  double number() { return (next_++)->toDouble(); }

 private:
  torch::jit::Stack::const_iterator next_;
};

// This part of both schemas. A new argument of both passes is added here and to AttentionArguments, in the same order.
inline constexpr char kAttentionSchema[] =
    "Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_len, Tensor? key_mask, SymInt window, "
    "Tensor? bidirectional_ranges, float softcap, Tensor? k_hr, Tensor? v_hr, Tensor? hr_slots, Tensor? hr_count, "
    "Tensor? hr_from, Tensor? hr_rows, Tensor? hr_row_bits, Tensor? alpha";

// Members are initialised from top to bottom, so each reads the argument that the schema has in its position.
// csrc/include/flexattn/hierarchical_attention.h gives shapes and meaning.
struct AttentionArguments {
  ArgumentReader& next;
  at::Tensor q = next.tensor();
  at::Tensor k = next.tensor();
  at::Tensor v = next.tensor();
  at::Tensor kv_start = next.tensor();
  at::Tensor kv_len = next.tensor();
  OptionalTensor key_mask = next.optional_tensor();
  int64_t window = next.integer();
  OptionalTensor bidirectional_ranges = next.optional_tensor();
  double softcap = next.number();
  OptionalTensor k_hr = next.optional_tensor();
  OptionalTensor v_hr = next.optional_tensor();
  OptionalTensor hr_slots = next.optional_tensor();
  OptionalTensor hr_count = next.optional_tensor();
  OptionalTensor hr_from = next.optional_tensor();
  OptionalTensor hr_rows = next.optional_tensor();
  OptionalTensor hr_row_bits = next.optional_tensor();
  OptionalTensor alpha = next.optional_tensor();
};

// Makes every argument dense except q, k, v and the pool, which are large and read with their strides.
void make_small_tensors_dense(AttentionArguments& a);

// Checks the arguments and describes them to the kernels. Raises ValueError with every reason, those given included.
AttentionInputs checked_inputs(Reasons& reasons, const AttentionArguments& a, double scale);

// Sizes, strides and pointers of the large tensors, unchecked; null pointers if there is no pool.
AttentionInputs attention_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const OptionalTensor& k_hr, const OptionalTensor& v_hr, double scale);

}  // namespace flexattn::torch_binding
