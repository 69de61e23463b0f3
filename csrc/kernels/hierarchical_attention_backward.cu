// The backward pass of hierarchical_attention: choice of the kernels, and the table of slots that all of them read.

#include "attention_backward.h"
#include "device.cuh"
#include "flexattn/attention_path.h"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 128;

// slot_to_key [B, P]: index of a slot in the sample's hr_slots, or -1.
__global__ void clear_slot_table(int32_t* table, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) table[i] = -1;
}

__global__ void fill_slot_table(AttentionInputs in, int32_t* table) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, b = i / in.selected,
                m = i % in.selected;
  if (b < in.batch && m < hr_keys(in, b)) table[b * in.pool + slot(in, b, m)] = static_cast<int32_t>(m);
}

void list_slots(const AttentionBackwardParams& p, Stream stream) {
  const AttentionInputs& in = p.in;
  const char* name = "hierarchical_attention_backward (slots)";
  launch(name, clear_slot_table, blocks_for(in.batch * in.pool, kThreads), kThreads, 0, stream, p.slot_to_key,
         in.batch * in.pool);
  launch(name, fill_slot_table, blocks_for(in.batch * in.selected, kThreads), kThreads, 0, stream, in, p.slot_to_key);
}

}  // namespace

void hierarchical_attention_backward(const AttentionBackwardParams& params, Stream stream) {
  if (params.grad_k_hr) list_slots(params, stream);
  const int capability = compute_capability();
  switch (choose_backward_path(params, capability).path) {
    case AttentionPath::kFma:
      return attention_backward_fma(params, stream);
    case AttentionPath::kVolta:
      return attention_backward_volta(params, capability, stream);
    case AttentionPath::kAmpere:
      return attention_backward_ampere(params, stream);
    default:
      return attention_backward_generic(params, stream);
  }
}

}  // namespace flexattn::cuda
