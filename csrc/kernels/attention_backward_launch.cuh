// Launches of the backward pass on tensor cores.
#pragma once

#include "attention_backward_tiles.cuh"

namespace flexattn::cuda {

template <typename Mma, int kD, int kWarps, template <typename, int> class KeysOf>
void launch_key_tiles(const char* name, const AttentionBackwardParams& p, Stream stream) {
  using Keys = KeysOf<typename Mma::Element, kWarps>;
  const BlockOrder order = Keys::order(p.in);
  launch(name, grad_key_tiles<Mma, kD, kWarps, KeysOf>, order.blocks(), kWarp * kWarps,
         key_shared_bytes<Mma, Keys, kWarps>(), stream, p, order);
}

template <typename Mma, int kD, bool kStates>
void launch_row_tiles(const char* name, const AttentionBackwardParams& p, Stream stream) {
  const BlockOrder order = row_order(p.in);
  launch(name, grad_row_tiles<Mma, kD, kStates>, order.blocks(), kTileThreads, row_shared_bytes<Mma>(p.in.selected),
         stream, p, order);
}

template <typename Mma, int kD>
void find_states(const AttentionBackwardParams& p, Stream stream) {
  const char* name = "hierarchical_attention_backward (states)";
  p.out ? launch_row_states<typename Mma::Element, 16>(name, p, stream)
        : launch_row_tiles<Mma, kD, true>(name, p, stream);
}

template <typename Mma, int kD, int kWarps>
void launch_backward(const AttentionBackwardParams& p, Stream stream) {
  find_states<Mma, kD>(p, stream);
  if (p.grad_q) launch_row_tiles<Mma, kD, false>("hierarchical_attention_backward (queries)", p, stream);
  if (p.grad_k) launch_key_tiles<Mma, kD, kWarps, SequenceKeys>("hierarchical_attention_backward (keys)", p, stream);
  if (p.grad_k_hr) launch_key_tiles<Mma, kD, kWarps, PoolKeys>("hierarchical_attention_backward (pool)", p, stream);
}

// Other head sizes run as the next larger of these, with zeros for the missing channels.
template <template <int> typename Mma, int kWarps>
void backward_of(const AttentionBackwardParams& p, Stream stream) {
  if (p.in.head_dim <= 64) return launch_backward<Mma<64>, 64, kWarps>(p, stream);
  if (p.in.head_dim <= 96) return launch_backward<Mma<96>, 96, kWarps>(p, stream);
  return launch_backward<Mma<128>, 128, kWarps>(p, stream);
}

}  // namespace flexattn::cuda
