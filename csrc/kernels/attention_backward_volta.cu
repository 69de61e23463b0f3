// The backward pass on the tensor cores of Volta and Turing.

#include "attention_backward.h"
#include "attention_backward_launch.cuh"
#include "mma_volta.cuh"

namespace flexattn::cuda {

// Eight warps share the keys of a block where its shared memory holds them; a block of Turing has 64 KB.
void attention_backward_volta(const AttentionBackwardParams& params, int capability, Stream stream) {
  if (capability < 75)
    backward_of<VoltaMma, 8>(params, stream);
  else
    backward_of<VoltaMma, 4>(params, stream);
}

}  // namespace flexattn::cuda
