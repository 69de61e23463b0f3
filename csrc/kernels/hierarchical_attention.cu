// The forward pass of hierarchical_attention: choice of the kernel.

#include "flexattn/hierarchical_attention.h"

#include "attention_decode.h"
#include "attention_generic.h"
#include "attention_prefill.h"
#include "device.cuh"
#include "flexattn/attention_path.h"

namespace flexattn::cuda {
namespace {

AttentionPath path_of(const AttentionInputs& in) { return choose_attention_path(in, compute_capability()).path; }

}  // namespace

int64_t hierarchical_attention_workspace(const AttentionForwardParams& params, Stream) {
  return path_of(params.in) == AttentionPath::kDecode ? attention_decode_workspace(params) : 0;
}

void hierarchical_attention_forward(const AttentionForwardParams& params, Stream stream) {
  switch (path_of(params.in)) {
    case AttentionPath::kGeneric:
      return attention_generic(params, stream);
    case AttentionPath::kDecode:
      return attention_decode(params, stream);
    case AttentionPath::kVolta:
      return attention_prefill(params, TensorCores::kVolta, stream);
    case AttentionPath::kAmpere:
      return attention_prefill(params, TensorCores::kAmpere, stream);
  }
}

}  // namespace flexattn::cuda
