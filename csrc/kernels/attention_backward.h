// The kernels of the backward pass; attention_path.h decides which of them run.
#pragma once

#include "flexattn/hierarchical_attention.h"

namespace flexattn::cuda {

void attention_backward_generic(const AttentionBackwardParams& params, Stream stream);
void attention_backward_fma(const AttentionBackwardParams& params, Stream stream);
void attention_backward_volta(const AttentionBackwardParams& params, int capability, Stream stream);
void attention_backward_ampere(const AttentionBackwardParams& params, Stream stream);

}  // namespace flexattn::cuda
