// Storage types: the type in which sums over them are kept, and dispatch over them. The half types of the host (c10)
// and of the device (CUDA) differ, so each side names its own.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// Calls function(T()) with the storage type T of a dtype.
template <typename Half, typename BFloat16, typename Function>
void dispatch_storage(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(double());
    case DType::kFloat32:
      return function(float());
    case DType::kFloat16:
      return function(Half());
    case DType::kBFloat16:
      return function(BFloat16());
  }
}

}  // namespace flexattn
