// The kernel for any head size and dtype.
#pragma once

#include "flexattn/hierarchical_attention.h"

namespace flexattn::cuda {

void attention_generic(const AttentionForwardParams& params, Stream stream);

}  // namespace flexattn::cuda
