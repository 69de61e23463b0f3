// The products are torch's own, on exactly the new rows; write_hr_kv rotates and stores them.

#include "flexattn/project_hr_kv.h"

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "flexattn/write_hr_kv.h"

namespace flexattn::cpu {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return at::kDouble;
    case DType::kFloat32:
      return at::kFloat;
    case DType::kFloat16:
      return at::kHalf;
    case DType::kBFloat16:
      return at::kBFloat16;
  }
  return at::kFloat;
}

// A tensor on memory that a kernel only reads.
at::Tensor read(const void* data, at::IntArrayRef sizes, DType dtype) {
  return at::from_blob(const_cast<void*>(data), sizes, scalar_type(dtype));
}

at::Tensor project(const ProjectHrKvParams& p, const at::Tensor& rows, const void* weight, const void* bias) {
  const int64_t width = p.heads * p.head_dim;
  return at::linear(rows, read(weight, {width, p.channels}, p.dtype),
                    bias ? std::optional(read(bias, {width}, p.dtype)) : std::nullopt);
}

}  // namespace

void project_hr_kv(const ProjectHrKvParams& p, Stream stream) {
  const int64_t count = *p.count;
  if (count == 0) return;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor tokens = at::from_blob(const_cast<int32_t*>(p.new_tokens), {count}, at::kInt);
  const auto rows_of = [&](const void* table, int64_t width, DType dtype) {
    return read(table, {p.tokens, width}, dtype).index_select(0, tokens);
  };
  const at::Tensor features = rows_of(p.features, p.channels, p.dtype);
  const at::Tensor k = project(p, features, p.k_weight, p.k_bias), v = project(p, features, p.v_weight, p.v_bias);
  const at::Tensor cos = rows_of(p.cos, p.head_dim, p.table_dtype), sin = rows_of(p.sin, p.head_dim, p.table_dtype);
  const Strides dense{0, p.head_dim, p.heads * p.head_dim};
  write_hr_kv({.dtype = p.dtype,
               .table_dtype = p.table_dtype,
               .rows = count,
               .heads = p.heads,
               .head_dim = p.head_dim,
               .pool = p.pool,
               .slots = p.new_slots,
               .k = k.const_data_ptr(),
               .v = v.const_data_ptr(),
               .k_pool = p.k_pool,
               .v_pool = p.v_pool,
               .k_strides = dense,
               .v_strides = dense,
               .k_pool_strides = p.k_pool_strides,
               .v_pool_strides = p.v_pool_strides,
               .cos = cos.const_data_ptr(),
               .sin = sin.const_data_ptr(),
               .cos_row = p.head_dim,
               .sin_row = p.head_dim},
              stream);
}

}  // namespace flexattn::cpu
