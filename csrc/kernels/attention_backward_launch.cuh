// Launches of the backward pass on tensor cores.
#pragma once

#include "attention_backward_tiles.cuh"

namespace flexattn::cuda {

template <typename Mma, int kD, int kWarps, template <typename, int> class KeysOf>
void launch_key_tiles(const char* name, const AttentionBackwardParams& p, Stream stream) {
  using Keys = KeysOf<typename Mma::Element, kWarps>;
  launch(name, grad_key_tiles<Mma, kD, kWarps, KeysOf>, Keys::blocks(p.in), kWarp * kWarps,
         key_shared_bytes<Mma, Keys, kWarps>(), stream, p);
}

template <typename Mma, int kD, int kWarps>
void launch_backward(const AttentionBackwardParams& p, Stream stream) {
  const AttentionInputs& in = p.in;
  const int64_t row_tiles = blocks_for(in.queries, kTileRows) * in.heads * in.batch;
  const size_t row_bytes = row_shared_bytes<Mma>(in.selected);
  launch("hierarchical_attention_backward (states)", grad_row_tiles<Mma, kD, true>, row_tiles, kTileThreads, row_bytes,
         stream, p);
  launch("hierarchical_attention_backward (queries)", grad_row_tiles<Mma, kD, false>, row_tiles, kTileThreads,
         row_bytes, stream, p);
  launch_key_tiles<Mma, kD, kWarps, SequenceKeys>("hierarchical_attention_backward (keys)", p, stream);
  if (in.k_hr) launch_key_tiles<Mma, kD, kWarps, PoolKeys>("hierarchical_attention_backward (pool)", p, stream);
}

// Other head sizes run as the next larger of these, with zeros for the missing channels.
template <template <int> typename Mma, int kWarps>
void backward_of(const AttentionBackwardParams& p, Stream stream) {
  if (p.in.head_dim <= 64) return launch_backward<Mma<64>, 64, kWarps>(p, stream);
  if (p.in.head_dim <= 96) return launch_backward<Mma<96>, 96, kWarps>(p, stream);
  return launch_backward<Mma<128>, 128, kWarps>(p, stream);
}

}  // namespace flexattn::cuda
