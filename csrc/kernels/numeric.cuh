// Conversions between storage types and the type in which their sums are kept, and dispatch over storage types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "flexattn/storage.h"

namespace flexattn::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, typename A>
__device__ T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__device__ inline __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename A>
__device__ A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

// The max of two, or NaN if either is NaN, so that it shows in the result and all lanes of a warp agree.
template <typename A>
__device__ A max_or_nan(A x, A y) {
  return x > y || x != x ? x : y;
}

// Calls function(T()) with the storage type T of a dtype.
template <typename Function>
void dispatch(DType dtype, const Function& function) {
  dispatch_storage<__half, __nv_bfloat16>(dtype, function);
}

// Calls function(T(), C()) with C that of cosines and sines too, which are in the same dtype or in float32.
template <typename Function>
void dispatch(DType dtype, DType table_dtype, const Function& function) {
  dispatch(dtype, [&](auto value) { table_dtype == dtype ? function(value, value) : function(value, float{}); });
}

}  // namespace flexattn::cuda
