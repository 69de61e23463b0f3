// The kernels for many query rows without tensor cores; attention_path.h decides when they run.
#pragma once

#include "flexattn/hierarchical_attention.h"

namespace flexattn::cuda {

void attention_fma(const AttentionForwardParams& params, Stream stream);

}  // namespace flexattn::cuda
