// How device code refuses: one line on standard output, then the launch fails. Index tensors are on the device, where
// no check of the host can read them without a wait; going on would return another tensor's memory as if it were right.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace flexattn::cuda {

__device__ __noinline__ inline void refuse(const char* what, int64_t value, int64_t low, int64_t high) {
  printf("flexattn_cuda::%s is %lld, it must lie in %lld to %lld\n", what, static_cast<long long>(value),
         static_cast<long long>(low), static_cast<long long>(high));
  __trap();
}

// `what` names operator and argument.
__device__ inline void require(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(what, value, low, high);
}

}  // namespace flexattn::cuda
