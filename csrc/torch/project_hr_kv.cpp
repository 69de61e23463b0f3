#include "flexattn/project_hr_kv.h"

#include <torch/library.h>

#include <utility>

#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;

struct Arguments {
  Tensor features, cos, sin, k_weight, v_weight;
  OptionalTensor k_bias, v_bias;
  Tensor tokens, slots, count, k_pool, v_pool;

  at::Device device() const { return features.device(); }
  int64_t table_rows() const { return features.size(0) * features.size(1); }
};

void check_dense(Reasons& reasons, const char* name, const Tensor& t) {
  reasons.unless(t.is_contiguous(), name, " has strides ", t.strides(), ", expected a dense tensor");
}

// Returns whether the pools have the right number of dimensions.
bool check_pools(Reasons& reasons, const Arguments& a) {
  const at::ScalarType dtype[] = {a.features.scalar_type()};
  if (!reasons.tensor("k_pool", a.k_pool, {-1, -1, -1}, dtype, a.device())) return false;
  reasons.unless(a.k_pool.size(2) % 2 == 0, "k_pool has head_dim ", a.k_pool.size(2), ", expected an even number");
  return reasons.tensor("v_pool", a.v_pool, a.k_pool.sizes(), dtype, a.device());
}

void check_projections(Reasons& reasons, const Arguments& a) {
  const at::ScalarType dtype[] = {a.features.scalar_type()}, table_dtypes[] = {dtype[0], at::kFloat};
  const int64_t G = a.features.size(0), T = a.features.size(1), D = a.features.size(2), d = a.k_pool.size(2),
                width = a.k_pool.size(1) * d;
  if (reasons.tensor("cos", a.cos, {G, T, d}, table_dtypes, a.device())) {
    const at::ScalarType same[] = {a.cos.scalar_type()};
    reasons.tensor("sin", a.sin, {G, T, d}, same, a.device());
  }
  reasons.tensor("k_weight", a.k_weight, {width, D}, dtype, a.device());
  reasons.tensor("v_weight", a.v_weight, {width, D}, dtype, a.device());
  reasons.tensor("k_bias", a.k_bias, {width}, dtype, a.device());
  reasons.tensor("v_bias", a.v_bias, {width}, dtype, a.device());
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"features", a.features},
                                {"cos", a.cos},
                                {"sin", a.sin},
                                {"k_weight", a.k_weight},
                                {"v_weight", a.v_weight}})
    check_dense(reasons, name, t);
}

void check_new_rows(Reasons& reasons, const Arguments& a) {
  if (!reasons.tensor("tokens", a.tokens, {-1}, kInt, a.device())) return;
  const int64_t M = a.tokens.size(0);
  reasons.tensor("slots", a.slots, {M}, kInt, a.device());
  if (reasons.tensor("count", a.count, {1}, kInt, a.device())) reasons.values_within("count", a.count, 0, M);
  if (!reasons.ok() || !readable(a.count)) return;
  const int64_t count = *ints(a.count);
  const Tensor slots = a.slots.narrow(0, 0, count);
  reasons.values_within("tokens", a.tokens.narrow(0, 0, count), 0, a.table_rows() - 1);
  reasons.values_within("slots", slots, 0, a.k_pool.size(0) - 1);
  if (reasons.ok()) reasons.distinct_in_rows("slots", slots.unsqueeze(0), a.k_pool.size(0));
}

void check_written(Reasons& reasons, const Arguments& a) {
  reasons.writable("k_pool", a.k_pool);
  reasons.writable("v_pool", a.v_pool);
  reasons.disjoint("k_pool", a.k_pool, "v_pool", a.v_pool);
  const auto disjoint_from_both = [&](const char* name, const Tensor& read) {
    reasons.disjoint("k_pool", a.k_pool, name, read);
    reasons.disjoint("v_pool", a.v_pool, name, read);
  };
  disjoint_from_both("features", a.features);
  disjoint_from_both("cos", a.cos);
  disjoint_from_both("sin", a.sin);
  disjoint_from_both("k_weight", a.k_weight);
  disjoint_from_both("v_weight", a.v_weight);
  if (a.k_bias) disjoint_from_both("k_bias", *a.k_bias);
  if (a.v_bias) disjoint_from_both("v_bias", *a.v_bias);
  disjoint_from_both("tokens", a.tokens);
  disjoint_from_both("slots", a.slots);
  disjoint_from_both("count", a.count);
}

void check(const Arguments& a) {
  Reasons reasons("project_hr_kv");
  reasons.tensor("features", a.features, {-1, -1, -1}, kFloatingPoint, a.device());
  reasons.raise_if_any();
  if (check_pools(reasons, a)) {
    check_projections(reasons, a);
    check_new_rows(reasons, a);
    check_written(reasons, a);
  }
  reasons.raise_if_any();
}

OptionalTensor without_negation(const OptionalTensor& t) {
  return t ? OptionalTensor(torch_binding::without_negation(*t)) : std::nullopt;
}

ProjectHrKvParams describe(const Arguments& a) {
  ProjectHrKvParams params{};
  params.dtype = dtype_of(a.features);
  params.table_dtype = dtype_of(a.cos);
  params.tokens = a.table_rows();
  params.channels = a.features.size(2);
  params.heads = a.k_pool.size(1);
  params.head_dim = a.k_pool.size(2);
  params.pool = a.k_pool.size(0);
  params.rows = a.tokens.size(0);
  params.count = ints(a.count);
  params.new_tokens = ints(a.tokens);
  params.new_slots = ints(a.slots);
  params.features = a.features.const_data_ptr();
  params.cos = a.cos.const_data_ptr();
  params.sin = a.sin.const_data_ptr();
  params.k_weight = a.k_weight.const_data_ptr();
  params.v_weight = a.v_weight.const_data_ptr();
  params.k_bias = a.k_bias ? a.k_bias->const_data_ptr() : nullptr;
  params.v_bias = a.v_bias ? a.v_bias->const_data_ptr() : nullptr;
  params.k_pool = a.k_pool.mutable_data_ptr();
  params.v_pool = a.v_pool.mutable_data_ptr();
  params.k_pool_strides = row_strides_of(a.k_pool);
  params.v_pool_strides = row_strides_of(a.v_pool);
  return params;
}

void project_hr_kv(const Tensor& features, const Tensor& cos, const Tensor& sin, const Tensor& k_weight,
                   const Tensor& v_weight, const OptionalTensor& k_bias, const OptionalTensor& v_bias,
                   const Tensor& tokens, const Tensor& slots, const Tensor& count, Tensor& k_pool, Tensor& v_pool) {
  const NvtxRange range("project_hr_kv");
  const auto plain = [](const Tensor& t) { return torch_binding::without_negation(t); };
  const Arguments a{
      plain(features),          plain(cos),    plain(sin),   plain(k_weight), plain(v_weight), without_negation(k_bias),
      without_negation(v_bias), plain(tokens), plain(slots), plain(count),    k_pool,          v_pool};
  check(a);
  if (tokens.numel() == 0 || k_pool.numel() == 0) return;
  const ProjectHrKvParams params = describe(a);
  FLEXATTN_LAUNCH(project_hr_kv, params, features);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  library.def(
      "project_hr_kv(Tensor features, Tensor cos, Tensor sin, Tensor k_weight, Tensor v_weight, Tensor? k_bias, "
      "Tensor? v_bias, Tensor tokens, Tensor slots, Tensor count, Tensor(a!) k_pool, Tensor(b!) v_pool) -> ()");
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { library.impl("project_hr_kv", &project_hr_kv); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { library.impl("project_hr_kv", &project_hr_kv); }

}  // namespace flexattn::torch_binding
