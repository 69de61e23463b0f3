// Both passes are registered as boxed functions, which read their arguments from the dispatcher's stack: the list of
// arguments then stands in one struct (attention_arguments.h) and not in every signature.

#include "flexattn/hierarchical_attention.h"

#include <torch/library.h>

#include <string>

#include "attention_arguments.h"
#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;
using torch::jit::Stack;

struct ForwardArguments {
  ArgumentReader next;
  AttentionArguments attention{next};
  OptionalTensor map_ranges = next.optional_tensor();
  int64_t map_size = next.integer();
  bool map_over_all = next.boolean();
  double scale = next.number();
};

struct BackwardArguments {
  ArgumentReader next;
  Tensor grad_out = next.tensor();
  AttentionArguments attention{next};
  OptionalTensor out = next.optional_tensor();
  Tensor lse = next.tensor();
  Tensor lse_seq = next.tensor();
  double scale = next.number();
  bool query_gradient = next.boolean();
  bool key_gradients = next.boolean();
  bool hr_gradients = next.boolean();
};

void check_map(Reasons& reasons, const OptionalTensor& map_ranges, int64_t map_size, const AttentionArguments& a) {
  reasons.unless(map_size >= 0, "map_size is ", map_size, ", expected at least 0");
  if (!reasons.tensor("map_ranges", map_ranges, {a.q.size(0), -1, 2}, kInt, a.q.device())) return;
  if (!readable(*map_ranges)) return;
  reasons.values_within("map_ranges", *map_ranges, 0, a.k.size(2));
  const int32_t* range = ints(map_ranges);
  for (const int32_t* end = range + map_ranges->numel(); range != end; range += 2) {
    const int64_t length = range[1] - range[0];
    reasons.unless(length == 0 || length == map_size, "map_ranges has a range of ", length,
                   " keys, expected 0 or map_size, which is ", map_size);
  }
}

struct ForwardOutputs {
  Tensor out, lse, lse_seq, map;
};

ForwardOutputs allocate(const Tensor& q, const AttentionForwardParams& params) {
  const AttentionInputs& in = params.in;
  const auto statistics = q.options().dtype(statistics_dtype(q.scalar_type()));
  ForwardOutputs outputs;
  outputs.out = at::empty({in.batch, in.queries, in.heads, in.head_dim}, q.options());
  outputs.lse = at::empty({in.batch, in.heads, in.queries}, statistics);
  outputs.lse_seq = at::empty({in.batch, in.heads, in.queries}, statistics);
  outputs.map = at::empty({in.batch, in.rows, params.images, params.map_size}, statistics);
  return outputs;
}

ForwardOutputs forward(ForwardArguments& arguments) {
  const NvtxRange range("hierarchical_attention");
  Reasons reasons("hierarchical_attention");
  AttentionArguments& a = arguments.attention;
  make_small_tensors_dense(a);
  const OptionalTensor map_ranges =
      arguments.map_ranges ? OptionalTensor(arguments.map_ranges->contiguous()) : std::nullopt;
  AttentionForwardParams params{};
  params.in = checked_inputs(reasons, a, arguments.scale);
  check_map(reasons, map_ranges, arguments.map_size, a);
  reasons.raise_if_any();

  params.images = map_ranges ? map_ranges->size(1) : 0;
  params.map_size = arguments.map_size;
  params.map_ranges = ints(map_ranges);
  params.map_over_all = arguments.map_over_all;
  ForwardOutputs outputs = allocate(a.q, params);
  params.out = outputs.out.mutable_data_ptr();
  params.lse = outputs.lse.mutable_data_ptr();
  params.lse_seq = outputs.lse_seq.mutable_data_ptr();
  params.map = outputs.map.mutable_data_ptr();
  if (outputs.map.numel() == 0) params.images = 0;
  const int64_t workspace_bytes = FLEXATTN_LAUNCH(hierarchical_attention_workspace, params, a.q);
  const Tensor workspace = at::empty({workspace_bytes}, a.q.options().dtype(at::kByte));
  params.workspace = workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
  if (outputs.out.numel()) FLEXATTN_LAUNCH(hierarchical_attention_forward, params, a.q);
  return outputs;
}

struct Gradients {
  Tensor q, k, v, k_hr, v_hr;
};

// Gradients of a pool that no row can see are zero; those that are not asked for, and those of no pool, are empty.
Gradients allocate(const BackwardArguments& arguments, const AttentionInputs& in) {
  const AttentionArguments& a = arguments.attention;
  const auto options = a.q.options();
  const auto like = [&](bool asked, const Tensor& x) {
    return at::empty(asked ? x.sizes() : at::IntArrayRef{0}, options);
  };
  const auto like_pool = [&](const OptionalTensor& pool) {
    if (!arguments.hr_gradients || !pool) return at::empty({0}, options);
    return in.k_hr ? at::empty(pool->sizes(), options) : at::zeros(pool->sizes(), options);
  };
  return {like(arguments.query_gradient, a.q), like(arguments.key_gradients, a.k), like(arguments.key_gradients, a.v),
          like_pool(a.k_hr), like_pool(a.v_hr)};
}

void check_saved(Reasons& reasons, const BackwardArguments& arguments, const AttentionInputs& in) {
  const Tensor& q = arguments.attention.q;
  const at::ScalarType dtype[] = {q.scalar_type()}, statistics[] = {statistics_dtype(q.scalar_type())};
  reasons.tensor("grad_out", arguments.grad_out, {in.batch, in.queries, in.heads, in.head_dim}, dtype, q.device());
  reasons.tensor("out", arguments.out, {in.batch, in.queries, in.heads, in.head_dim}, dtype, q.device());
  reasons.unless(!(arguments.out && arguments.attention.alpha),
                 "out and alpha are both given, expected no out with alpha, since it mixes two softmaxes");
  reasons.tensor("lse", arguments.lse, {in.batch, in.heads, in.queries}, statistics, q.device());
  reasons.tensor("lse_seq", arguments.lse_seq, {in.batch, in.heads, in.queries}, statistics, q.device());
}

Gradients backward(BackwardArguments& arguments) {
  const NvtxRange range("hierarchical_attention_backward");
  Reasons reasons("hierarchical_attention_backward");
  AttentionArguments& a = arguments.attention;
  make_small_tensors_dense(a);
  AttentionBackwardParams params{};
  params.in = checked_inputs(reasons, a, arguments.scale);
  const AttentionInputs& in = params.in;
  check_saved(reasons, arguments, in);
  reasons.raise_if_any();

  const Tensor out = arguments.out ? arguments.out->contiguous() : Tensor();
  const Tensor lse = arguments.lse.contiguous(), lse_seq = arguments.lse_seq.contiguous();
  const Tensor& grad_out = arguments.grad_out;
  Gradients gradients = allocate(arguments, in);
  const bool pool = arguments.hr_gradients && in.k_hr;
  const Tensor row_states = at::empty({in.batch, in.heads, in.queries, 4}, lse.options());
  const Tensor slot_to_key = at::empty({pool ? in.batch : 0, in.pool}, a.q.options().dtype(at::kInt));
  const auto pointer = [](bool wanted, const Tensor& x) { return wanted ? x.mutable_data_ptr() : nullptr; };
  params.grad_out = grad_out.const_data_ptr();
  params.grad_out_strides = {grad_out.stride(0), grad_out.stride(2), grad_out.stride(1)};
  params.out = out.defined() ? out.const_data_ptr() : nullptr;
  params.lse = lse.const_data_ptr();
  params.lse_seq = lse_seq.const_data_ptr();
  params.grad_q = pointer(arguments.query_gradient, gradients.q);
  params.grad_k = pointer(arguments.key_gradients, gradients.k);
  params.grad_v = pointer(arguments.key_gradients, gradients.v);
  params.grad_k_hr = pointer(pool, gradients.k_hr);
  params.grad_v_hr = pointer(pool, gradients.v_hr);
  params.row_states = row_states.mutable_data_ptr();
  params.slot_to_key = pool ? mutable_ints(slot_to_key) : nullptr;
  if (a.q.numel()) {
    FLEXATTN_LAUNCH(hierarchical_attention_backward, params, a.q);
  } else {
    for (const Tensor& x : {gradients.k, gradients.v, gradients.k_hr, gradients.v_hr}) x.zero_();
  }
  return gradients;
}

void boxed_forward(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  ForwardArguments arguments{ArgumentReader(*stack, count)};
  ForwardOutputs outputs = forward(arguments);
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, outputs.out, outputs.lse, outputs.lse_seq, outputs.map);
}

void boxed_backward(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  BackwardArguments arguments{ArgumentReader(*stack, count)};
  Gradients gradients = backward(arguments);
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, gradients.q, gradients.k, gradients.v, gradients.k_hr, gradients.v_hr);
}

template <typename Library>
void register_kernels(Library& library) {
  library.impl("hierarchical_attention", torch::CppFunction::makeFromBoxedFunction<&boxed_forward>());
  library.impl("hierarchical_attention_backward", torch::CppFunction::makeFromBoxedFunction<&boxed_backward>());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  const std::string shared = kAttentionSchema;
  const std::string forward = "hierarchical_attention(" + shared +
                              ", Tensor? map_ranges, SymInt map_size, bool map_over_all, float scale) -> "
                              "(Tensor out, Tensor lse, Tensor lse_seq, Tensor map)";
  const std::string backward = "hierarchical_attention_backward(Tensor grad_out, " + shared +
                               ", Tensor? out, Tensor lse, Tensor lse_seq, float scale, bool query_gradient, "
                               "bool key_gradients, bool hr_gradients) -> "
                               "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_k_hr, Tensor grad_v_hr)";
  library.def(forward.c_str());
  library.def(backward.c_str());
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { register_kernels(library); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { register_kernels(library); }

}  // namespace flexattn::torch_binding
