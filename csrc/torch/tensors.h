// Small helpers that turn tensors into what the launch functions of csrc/include/flexattn take.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "flexattn/types.h"

namespace flexattn::torch_binding {

using OptionalTensor = std::optional<at::Tensor>;

inline const int32_t* ints(const at::Tensor& t) { return t.const_data_ptr<int32_t>(); }
inline const int32_t* ints(const OptionalTensor& t) { return t ? ints(*t) : nullptr; }
inline int32_t* mutable_ints(const at::Tensor& t) { return t.mutable_data_ptr<int32_t>(); }

// torch resolves negative views (of imaginary parts) before it calls an operator, except for those that write
// arguments: flexattn_cuda/registration.py says why.
inline at::Tensor without_negation(const at::Tensor& t) { return t.is_neg() ? t.resolve_neg() : t; }

// A [batch, head, row, channel] tensor.
inline Strides strides_of(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// A [row, head, channel] tensor.
inline Strides row_strides_of(const at::Tensor& t) { return {0, t.stride(1), t.stride(0)}; }

// The dtype that statistics of attention (log-sum-exp, maps) are kept in.
inline at::ScalarType statistics_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, "flexattn_cuda: a tensor has dtype ", t.scalar_type(),
                        ", expected float64, float32, float16 or bfloat16");
  }
}

}  // namespace flexattn::torch_binding
