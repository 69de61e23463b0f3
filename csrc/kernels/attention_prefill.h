// The tensor-core kernel for many query rows; attention_path.h decides when it runs.
#pragma once

#include "flexattn/hierarchical_attention.h"

namespace flexattn::cuda {

enum class TensorCores { kVolta, kAmpere };

void attention_prefill(const AttentionForwardParams& params, TensorCores cores, Stream stream);

}  // namespace flexattn::cuda
