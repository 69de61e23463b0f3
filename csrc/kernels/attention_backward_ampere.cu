// The backward pass on tensor cores from Ampere on.

#include "attention_backward.h"
#include "attention_backward_launch.cuh"
#include "mma_ampere.cuh"

namespace flexattn::cuda {
namespace {

template <int kD>
using Half = AmpereMma<__half, kD>;
template <int kD>
using BFloat = AmpereMma<__nv_bfloat16, kD>;

}  // namespace

void attention_backward_ampere(const AttentionBackwardParams& params, Stream stream) {
  if (params.in.dtype == DType::kFloat16)
    backward_of<Half, 4>(params, stream);
  else
    backward_of<BFloat, 4>(params, stream);
}

}  // namespace flexattn::cuda
