// How device code refuses: one line on standard output, then the launch fails. Index tensors are on the device, where
// the host cannot check them without a synchronisation; to go on would be to return unrelated memory as a result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace flexattn::cuda {

// The compiler must know that it does not return: otherwise callers save their registers around the call.
[[noreturn]] __device__ __noinline__ inline void refuse(const char* what, int64_t value, int64_t low, int64_t high) {
  printf("flexattn_cuda::%s is %lld, it must lie in %lld to %lld\n", what, static_cast<long long>(value),
         static_cast<long long>(low), static_cast<long long>(high));
  __trap();
}

// Refuse if value is not in [low, high]. `what` names the operator and the argument.
__device__ inline void require(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(what, value, low, high);
}

}  // namespace flexattn::cuda
