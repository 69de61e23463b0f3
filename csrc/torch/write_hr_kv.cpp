#include "flexattn/write_hr_kv.h"

#include <torch/library.h>

#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;

struct Rows {
  Tensor k, v, cos, sin, slots;
};

void check_rows(Reasons& reasons, const Rows& rows) {
  const at::Device device = rows.k.device();
  const at::ScalarType dtype[] = {rows.k.scalar_type()}, table_dtypes[] = {rows.k.scalar_type(), at::kFloat};
  const int64_t M = rows.k.size(0), heads = rows.k.size(1), d = rows.k.size(2);
  reasons.unless(d % 2 == 0, "k has head_dim ", d, ", expected an even number");
  reasons.tensor("v", rows.v, {M, heads, d}, dtype, device);
  if (reasons.tensor("cos", rows.cos, {M, d}, table_dtypes, device)) {
    const at::ScalarType same[] = {rows.cos.scalar_type()};
    reasons.tensor("sin", rows.sin, {M, d}, same, device);
  }
}

void check_pool(Reasons& reasons, const Rows& rows, const Tensor& k_pool, const Tensor& v_pool) {
  const at::Device device = rows.k.device();
  const at::ScalarType dtype[] = {rows.k.scalar_type()};
  const int64_t M = rows.k.size(0), heads = rows.k.size(1), d = rows.k.size(2);
  const bool slots_fit = reasons.tensor("slots", rows.slots, {M}, kInt, device);
  if (!reasons.tensor("k_pool", k_pool, {-1, heads, d}, dtype, device)) return;
  const int64_t P = k_pool.size(0);
  reasons.tensor("v_pool", v_pool, {P, heads, d}, dtype, device);
  if (slots_fit) reasons.values_within("slots", rows.slots, -1, P - 1);
  if (reasons.ok()) reasons.distinct_in_rows("slots", rows.slots.unsqueeze(0), P);
}

void check_written(Reasons& reasons, const Rows& rows, const Tensor& k_pool, const Tensor& v_pool) {
  reasons.writable("k_pool", k_pool);
  reasons.writable("v_pool", v_pool);
  reasons.disjoint("k_pool", k_pool, "v_pool", v_pool);
  const auto disjoint_from_both = [&](const char* name, const Tensor& read) {
    reasons.disjoint("k_pool", k_pool, name, read);
    reasons.disjoint("v_pool", v_pool, name, read);
  };
  disjoint_from_both("k", rows.k);
  disjoint_from_both("v", rows.v);
  disjoint_from_both("cos", rows.cos);
  disjoint_from_both("sin", rows.sin);
  disjoint_from_both("slots", rows.slots);
}

void check(const Rows& rows, const Tensor& k_pool, const Tensor& v_pool) {
  Reasons reasons("write_hr_kv");
  reasons.tensor("k", rows.k, {-1, -1, -1}, kFloatingPoint, rows.k.device());
  reasons.raise_if_any();
  check_rows(reasons, rows);
  check_pool(reasons, rows, k_pool, v_pool);
  check_written(reasons, rows, k_pool, v_pool);
  reasons.raise_if_any();
}

void write_hr_kv(const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const Tensor& slots,
                 Tensor& k_pool, Tensor& v_pool) {
  const NvtxRange range("write_hr_kv");
  const Rows rows{without_negation(k), without_negation(v), without_negation(cos), without_negation(sin),
                  without_negation(slots)};
  check(rows, k_pool, v_pool);
  if (k.numel() == 0) return;
  const Tensor dense_slots = rows.slots.contiguous();

  WriteHrKvParams params{};
  params.dtype = dtype_of(rows.k);
  params.table_dtype = dtype_of(rows.cos);
  params.rows = k.size(0);
  params.heads = k.size(1);
  params.head_dim = k.size(2);
  params.pool = k_pool.size(0);
  params.slots = ints(dense_slots);
  params.k = rows.k.const_data_ptr();
  params.v = rows.v.const_data_ptr();
  params.k_pool = k_pool.mutable_data_ptr();
  params.v_pool = v_pool.mutable_data_ptr();
  params.k_strides = row_strides_of(rows.k);
  params.v_strides = row_strides_of(rows.v);
  params.k_pool_strides = row_strides_of(k_pool);
  params.v_pool_strides = row_strides_of(v_pool);
  params.cos = rows.cos.const_data_ptr();
  params.sin = rows.sin.const_data_ptr();
  params.cos_row = rows.cos.stride(0);
  params.sin_row = rows.sin.stride(0);
  FLEXATTN_LAUNCH(write_hr_kv, params, rows.k);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  library.def(
      "write_hr_kv(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_pool, Tensor(b!) v_pool) -> "
      "()");
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { library.impl("write_hr_kv", &write_hr_kv); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { library.impl("write_hr_kv", &write_hr_kv); }

}  // namespace flexattn::torch_binding
