// The backward pass without tensor cores.

#include "attention_backward.h"
#include "attention_backward_fma.cuh"

namespace flexattn::cuda {
namespace {

template <typename T, int kD, bool kStates>
void launch_row_fma(const char* name, const AttentionBackwardParams& p, Stream stream) {
  const BlockOrder order = row_order(p.in);
  launch(name, grad_row_fma<T, kD, kStates>, order.blocks(), kTileThreads, fma_row_shared_bytes<T>(p.in.selected),
         stream, p, order);
}

template <typename T, int kD, bool kOfKeys, bool kOfValues, template <typename, int> class KeysOf>
void launch_key_kernel(const char* name, const AttentionBackwardParams& p, Stream stream) {
  using Keys = KeysOf<T, kTileThreads / kWarp>;
  const BlockOrder order = Keys::order(p.in);
  launch(name, grad_key_fma<T, kD, kOfKeys, kOfValues, KeysOf>, order.blocks(), kTileThreads,
         sizeof(FmaKeyShared<T, Keys>), stream, p, order);
}

template <typename T, int kD, template <typename, int> class KeysOf>
void launch_key_fma(const char* name, const AttentionBackwardParams& p, Stream stream) {
  if constexpr (kD <= 128) {
    launch_key_kernel<T, kD, true, true, KeysOf>(name, p, stream);
  } else {
    launch_key_kernel<T, kD, true, false, KeysOf>(name, p, stream);
    launch_key_kernel<T, kD, false, true, KeysOf>(name, p, stream);
  }
}

template <typename T, int kD>
void launch_backward(const AttentionBackwardParams& p, Stream stream) {
  const char* states = "hierarchical_attention_backward (states)";
  p.out ? launch_row_states<T, kD <= 128 ? 16 : 32>(states, p, stream) : launch_row_fma<T, kD, true>(states, p, stream);
  if (p.grad_q) launch_row_fma<T, kD, false>("hierarchical_attention_backward (queries)", p, stream);
  if (p.grad_k) launch_key_fma<T, kD, SequenceKeys>("hierarchical_attention_backward (keys)", p, stream);
  if (p.grad_k_hr) launch_key_fma<T, kD, PoolKeys>("hierarchical_attention_backward (pool)", p, stream);
}

// Other head sizes run as the next larger of these, with zeros for the missing channels.
template <typename T>
void backward_of(const AttentionBackwardParams& p, Stream stream) {
  if (p.in.head_dim <= 64) return launch_backward<T, 64>(p, stream);
  if (p.in.head_dim <= 128) return launch_backward<T, 128>(p, stream);
  return launch_backward<T, 256>(p, stream);
}

}  // namespace

void attention_backward_fma(const AttentionBackwardParams& params, Stream stream) {
  switch (params.in.dtype) {
    case DType::kFloat32:
      return backward_of<float>(params, stream);
    case DType::kBFloat16:
      return backward_of<__nv_bfloat16>(params, stream);
    case DType::kFloat16:  // smaller heads run on tensor cores
      return launch_backward<__half, 256>(params, stream);
    case DType::kFloat64:  // the generic path
      return;
  }
}

}  // namespace flexattn::cuda
