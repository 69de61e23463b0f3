// The kernel for few query rows; attention_path.h decides when it runs.
#pragma once

#include "flexattn/hierarchical_attention.h"

namespace flexattn::cuda {

int64_t attention_decode_workspace(const AttentionForwardParams& params);  // bytes
void attention_decode(const AttentionForwardParams& params, Stream stream);

}  // namespace flexattn::cuda
