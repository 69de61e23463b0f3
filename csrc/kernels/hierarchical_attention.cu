// The forward pass of hierarchical_attention: choice of the kernel, and a check of the slots that it reads.

#include "flexattn/hierarchical_attention.h"

#include "attention_decode.h"
#include "attention_fma.h"
#include "attention_generic.h"
#include "attention_prefill.h"
#include "device.cuh"
#include "flexattn/attention_path.h"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

AttentionPath path_of(const AttentionInputs& in) { return choose_attention_path(in, compute_capability()).path; }

constexpr int kThreads = 128;

// A thread per slot.
__global__ void check_slots(AttentionInputs in) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, b = i / in.selected,
                m = i % in.selected;
  if (b < in.batch && m < hr_keys(in, b)) slot(in, b, m);
}

}  // namespace

int64_t hierarchical_attention_workspace(const AttentionForwardParams& params, Stream) {
  return path_of(params.in) == AttentionPath::kDecode ? attention_decode_workspace(params) : 0;
}

void hierarchical_attention_forward(const AttentionForwardParams& params, Stream stream) {
  const AttentionInputs& in = params.in;
  const AttentionPath path = path_of(in);
  // The decode kernel reads each slot once and checks it there; the loops over tiles have no registers left for that.
  if (in.k_hr && path != AttentionPath::kDecode)
    launch("hierarchical_attention (slots)", check_slots, blocks_for(in.batch * in.selected, kThreads), kThreads, 0,
           stream, in);
  switch (path) {
    case AttentionPath::kGeneric:
      return attention_generic(params, stream);
    case AttentionPath::kDecode:
      return attention_decode(params, stream);
    case AttentionPath::kFma:
      return attention_fma(params, stream);
    case AttentionPath::kVolta:
      return attention_prefill(params, TensorCores::kVolta, stream);
    case AttentionPath::kAmpere:
      return attention_prefill(params, TensorCores::kAmpere, stream);
  }
}

}  // namespace flexattn::cuda
