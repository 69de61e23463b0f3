// Launches of the backward pass on tensor cores.
#pragma once

#include "attention_backward_tiles.cuh"

namespace flexattn::cuda {

template <typename Mma, int kD, int kWarps>
void launch_backward(const AttentionBackwardParams& p, Stream stream) {
  const AttentionInputs& in = p.in;
  const int64_t row_tiles = blocks_for(in.queries, kTileRows) * in.heads * in.batch;
  const size_t row_bytes = row_shared_bytes<Mma>(in.selected), key_bytes = key_shared_bytes<Mma, kWarps>();
  launch("hierarchical_attention_backward (states)", grad_row_tiles<Mma, kD, true>, row_tiles, kTileThreads, row_bytes,
         stream, p);
  launch("hierarchical_attention_backward (queries)", grad_row_tiles<Mma, kD, false>, row_tiles, kTileThreads,
         row_bytes, stream, p);
  launch("hierarchical_attention_backward (keys)", grad_key_tiles<Mma, kD, kWarps, SequenceKeys>,
         SequenceKeys<typename Mma::Element, kWarps>::blocks(in), kWarp * kWarps, key_bytes, stream, p);
  if (!in.k_hr) return;
  launch("hierarchical_attention_backward (pool)", grad_key_tiles<Mma, kD, kWarps, PoolKeys>,
         PoolKeys<typename Mma::Element, kWarps>::blocks(in), kWarp * kWarps, key_bytes, stream, p);
}

// Other head sizes run as the next larger of these, with zeros for the missing channels.
template <template <int> typename Mma, int kWarps>
void backward_of(const AttentionBackwardParams& p, Stream stream) {
  if (p.in.head_dim <= 64) return launch_backward<Mma<64>, 64, kWarps>(p, stream);
  if (p.in.head_dim <= 96) return launch_backward<Mma<96>, 96, kWarps>(p, stream);
  return launch_backward<Mma<128>, 128, kWarps>(p, stream);
}

}  // namespace flexattn::cuda
