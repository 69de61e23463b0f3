// Schemas, and the four faces of every operator: CPU, CUDA, Meta (shapes only) and Autograd.
//
// The Meta functions take symbolic sizes, so that compiled code with changing lengths is not compiled again. The
// Autograd functions call the backward operators through the dispatcher, so that compiled training sees operators it
// knows.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "operators.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

c10::SymInt words(const c10::SymInt& bits) { return (bits + 31) / 32; }

// ---------------------------------------------------------------------------------------------------- CPU and CUDA

Four attention_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_start, const Tensor& kv_len,
                      const OptionalTensor& key_mask, const OptionalTensor& k_hr, const OptionalTensor& v_hr,
                      const OptionalTensor& hr_slots, const OptionalTensor& hr_count, const OptionalTensor& hr_from,
                      const OptionalTensor& hr_rows, const OptionalTensor& hr_row_bits, const OptionalTensor& alpha,
                      const OptionalTensor& map_ranges, int64_t map_size, bool map_over_all, double scale) {
  return hierarchical_attention(
      q, k, v, {kv_start, kv_len, key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from, hr_rows, hr_row_bits, alpha},
      map_ranges, map_size, map_over_all, scale);
}

Five attention_backward_kernel(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& kv_start, const Tensor& kv_len, const OptionalTensor& key_mask,
                               const OptionalTensor& k_hr, const OptionalTensor& v_hr, const OptionalTensor& hr_slots,
                               const OptionalTensor& hr_count, const OptionalTensor& hr_from,
                               const OptionalTensor& hr_rows, const OptionalTensor& hr_row_bits,
                               const OptionalTensor& alpha, const Tensor& lse, const Tensor& lse_seq, double scale) {
  return hierarchical_attention_backward(
      grad_out, q, k, v,
      {kv_start, kv_len, key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from, hr_rows, hr_row_bits, alpha}, lse, lse_seq,
      scale);
}

// ------------------------------------------------------------------------------------------------------------ Meta

Four select_tokens_meta(const Tensor& map, const Tensor&, c10::SymInt hr_side, double, double, const c10::SymInt&) {
  const c10::SymInt B = map.sym_size(0), R = map.sym_size(1), I = map.sym_size(2), tokens = I * hr_side * hr_side;
  const auto i32 = map.options().dtype(at::kInt);
  return {at::empty_symint({B, R, I, hr_side * hr_side}, map.options().dtype(at::kBool)),
          at::empty_symint({B, tokens}, i32), at::empty_symint({B}, i32), at::empty_symint({B, R, words(tokens)}, i32)};
}

Tensor gather_tokens_meta(const Tensor& tokens, const Tensor& index) {
  return at::empty_symint({tokens.sym_size(0), index.sym_size(1), tokens.sym_size(2)}, tokens.options());
}

Tensor gather_tokens_backward_meta(const Tensor& grad, const Tensor&, c10::SymInt num_tokens) {
  return at::empty_symint({grad.sym_size(0), num_tokens, grad.sym_size(2)}, grad.options());
}

Five assign_slots_meta(const Tensor& index, const Tensor&, Tensor&, Tensor&, c10::SymInt) {
  const c10::SymInt B = index.sym_size(0), M = index.sym_size(1);
  const auto ints = [&](c10::SymIntArrayRef sizes) { return at::empty_symint(sizes, index.options()); };
  return {ints({B, M}), ints({B * M}), ints({B * M}), ints({1}), ints({1})};
}

void write_hr_kv_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Tensor&, Tensor&) {}

Four attention_meta(const Tensor& q, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, const OptionalTensor& hr_rows, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor& map_ranges, c10::SymInt map_size, bool, double) {
  const c10::SymInt B = q.sym_size(0), H = q.sym_size(1), N = q.sym_size(2), d = q.sym_size(3);
  const c10::SymInt R = hr_rows ? hr_rows->sym_size(1) : c10::SymInt(1),
                    I = map_ranges ? map_ranges->sym_size(1) : c10::SymInt(0);
  const auto stats = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_symint({B, N, H, d}, q.options()), at::empty_symint({B, H, N}, stats),
          at::empty_symint({B, H, N}, stats), at::empty_symint({B, R, I, map_size}, stats)};
}

Five attention_backward_meta(const Tensor&, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor&,
                             const Tensor&, const OptionalTensor&, const OptionalTensor& k_hr,
                             const OptionalTensor& v_hr, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const Tensor&, const Tensor&, double) {
  const auto like = [&](const Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); };
  const auto like_pool = [&](const OptionalTensor& t) { return t ? like(*t) : at::empty({0}, q.options()); };
  return {like(q), like(k), like(v), like_pool(k_hr), like_pool(v_hr)};
}

// -------------------------------------------------------------------------------------------------------- Autograd

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using GatherSignature = Tensor(const Tensor&, const Tensor&);
using GatherBackwardSignature = Tensor(const Tensor&, const Tensor&, c10::SymInt);
using AttentionSignature = Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, c10::SymInt, bool, double);
using AttentionBackwardSignature = Five(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                        const OptionalTensor&, const Tensor&, const Tensor&, double);

struct GatherTokens : torch::autograd::Function<GatherTokens> {
  static Tensor forward(AutogradContext* context, const Tensor& tokens, const Tensor& index) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({index});
    context->saved_data["num_tokens"] = tokens.sym_size(1);
    static const auto forward_op = op<GatherSignature>("flexattn_cuda::gather_tokens");
    return forward_op.call(tokens, index);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static const auto backward_op = op<GatherBackwardSignature>("flexattn_cuda::gather_tokens_backward");
    return {backward_op.call(grads[0].contiguous(), context->get_saved_variables()[0],
                             context->saved_data["num_tokens"].toSymInt()),
            Tensor()};
  }
};

Tensor gather_tokens_autograd(const Tensor& tokens, const Tensor& index) { return GatherTokens::apply(tokens, index); }

struct HierarchicalAttention : torch::autograd::Function<HierarchicalAttention> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& kv_start, const Tensor& kv_len, const OptionalTensor& key_mask,
                               const OptionalTensor& k_hr, const OptionalTensor& v_hr, const OptionalTensor& hr_slots,
                               const OptionalTensor& hr_count, const OptionalTensor& hr_from,
                               const OptionalTensor& hr_rows, const OptionalTensor& hr_row_bits,
                               const OptionalTensor& alpha, const OptionalTensor& map_ranges, c10::SymInt map_size,
                               bool map_over_all, double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto forward_op = op<AttentionSignature>("flexattn_cuda::hierarchical_attention");
    auto [out, lse, lse_seq, map] =
        forward_op.call(q, k, v, kv_start, kv_len, key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from, hr_rows,
                        hr_row_bits, alpha, map_ranges, map_size, map_over_all, scale);
    const auto saved = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    context->save_for_backward({q, k, v, kv_start, kv_len, saved(key_mask), saved(k_hr), saved(v_hr), saved(hr_slots),
                                saved(hr_count), saved(hr_from), saved(hr_rows), saved(hr_row_bits), saved(alpha), lse,
                                lse_seq});
    context->saved_data["scale"] = scale;
    context->mark_non_differentiable({lse, lse_seq, map});
    return {out, lse, lse_seq, map};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list s = context->get_saved_variables();
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    static const auto backward_op = op<AttentionBackwardSignature>("flexattn_cuda::hierarchical_attention_backward");
    // A gradient of a constant arrives expanded, without a dense last dimension.
    auto [q, k, v, k_hr, v_hr] =
        backward_op.call(grads[0].contiguous(), s[0], s[1], s[2], s[3], s[4], optional(s[5]), optional(s[6]),
                         optional(s[7]), optional(s[8]), optional(s[9]), optional(s[10]), optional(s[11]),
                         optional(s[12]), optional(s[13]), s[14], s[15], context->saved_data["scale"].toDouble());
    const Tensor none;
    const bool pool = s[6].defined();
    return {q,    k,    v,    none, none, none, pool ? k_hr : none, pool ? v_hr : none, none, none, none, none,
            none, none, none, none, none, none};
  }
};

Four attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_start, const Tensor& kv_len,
                        const OptionalTensor& key_mask, const OptionalTensor& k_hr, const OptionalTensor& v_hr,
                        const OptionalTensor& hr_slots, const OptionalTensor& hr_count, const OptionalTensor& hr_from,
                        const OptionalTensor& hr_rows, const OptionalTensor& hr_row_bits, const OptionalTensor& alpha,
                        const OptionalTensor& map_ranges, c10::SymInt map_size, bool map_over_all, double scale) {
  const variable_list outputs =
      HierarchicalAttention::apply(q, k, v, kv_start, kv_len, key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from,
                                   hr_rows, hr_row_bits, alpha, map_ranges, map_size, map_over_all, scale);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

template <typename Library>
void register_kernels(Library& library) {
  library.impl("select_tokens", &select_tokens);
  library.impl("gather_tokens", &gather_tokens);
  library.impl("gather_tokens_backward", &gather_tokens_backward);
  library.impl("assign_slots", &assign_slots);
  library.impl("write_hr_kv", &write_hr_kv);
  library.impl("hierarchical_attention", &attention_kernel);
  library.impl("hierarchical_attention_backward", &attention_backward_kernel);
}

}  // namespace

TORCH_LIBRARY(flexattn_cuda, library) {
  library.def(
      "select_tokens(Tensor map, Tensor live, SymInt hr_side, float scale, float threshold, SymInt pool_side=0)"
      " -> (Tensor mask, Tensor index, Tensor count, Tensor row_bits)");
  library.def("gather_tokens(Tensor tokens, Tensor index) -> Tensor");
  library.def("gather_tokens_backward(Tensor grad, Tensor index, SymInt num_tokens) -> Tensor");
  library.def(
      "assign_slots(Tensor index, Tensor count, Tensor(a!) table, Tensor(b!) next_free, SymInt capacity)"
      " -> (Tensor slots, Tensor new_tokens, Tensor new_slots, Tensor new_count, Tensor overflow)");
  library.def(
      "write_hr_kv(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_pool, Tensor(b!) v_pool) -> "
      "()");
  library.def(
      "hierarchical_attention(Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_len, Tensor? key_mask, Tensor? "
      "k_hr,"
      " Tensor? v_hr, Tensor? hr_slots, Tensor? hr_count, Tensor? hr_from, Tensor? hr_rows, Tensor? hr_row_bits, "
      "Tensor? alpha,"
      " Tensor? map_ranges, SymInt map_size, bool map_over_all, float scale)"
      " -> (Tensor out, Tensor lse, Tensor lse_seq, Tensor map)");
  library.def(
      "hierarchical_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_len,"
      " Tensor? key_mask, Tensor? k_hr, Tensor? v_hr, Tensor? hr_slots, Tensor? hr_count, Tensor? hr_from, Tensor? "
      "hr_rows,"
      " Tensor? hr_row_bits, Tensor? alpha, Tensor lse, Tensor lse_seq, float scale)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_k_hr, Tensor grad_v_hr)");
}

TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { register_kernels(library); }

TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { register_kernels(library); }

TORCH_LIBRARY_IMPL(flexattn_cuda, Meta, library) {
  library.impl("select_tokens", &select_tokens_meta);
  library.impl("gather_tokens", &gather_tokens_meta);
  library.impl("gather_tokens_backward", &gather_tokens_backward_meta);
  library.impl("assign_slots", &assign_slots_meta);
  library.impl("write_hr_kv", &write_hr_kv_meta);
  library.impl("hierarchical_attention", &attention_meta);
  library.impl("hierarchical_attention_backward", &attention_backward_meta);
}

TORCH_LIBRARY_IMPL(flexattn_cuda, Autograd, library) {
  library.impl("gather_tokens", &gather_tokens_autograd);
  library.impl("hierarchical_attention", &attention_autograd);
}

}  // namespace flexattn::torch_binding
