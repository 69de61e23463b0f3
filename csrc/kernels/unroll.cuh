// Loops whose counter is a compile-time constant in the body.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace flexattn::cuda {

// Call function(std::integral_constant<int, i>()) for each i < n.
template <int n, int i = 0, typename Function>
__device__ __forceinline__ void unrolled(const Function& function) {
  if constexpr (i < n) {
    function(std::integral_constant<int, i>());
    unrolled<n, i + 1>(function);
  }
}

}  // namespace flexattn::cuda
