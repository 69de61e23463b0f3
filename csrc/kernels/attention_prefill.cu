// Choice and launch of the tensor-core kernels: attention, and its map.

#include "attention_map_tiles.cuh"
#include "attention_prefill.cuh"
#include "attention_prefill.h"
#include "mma_ampere.cuh"
#include "mma_volta.cuh"

namespace flexattn::cuda {
namespace {

template <typename Mma, int kD>
void launch_prefill(const AttentionForwardParams& p, Stream stream) {
  const BlockOrder order = row_order(p.in);
  launch("hierarchical_attention (prefill)", prefill_tiles<Mma, kD>, order.blocks(), kTileThreads,
         prefill_shared_bytes<Mma>(p.in.selected), stream, p, order, static_cast<float>(p.in.scale * kLog2e));
  launch("hierarchical_attention (map)", map_tiles<Mma, kD>, map_blocks(p), kTileThreads, map_shared_bytes<Mma>(),
         stream, p);
}

// Other head sizes run as the next larger of these, with zeros for the missing channels.
template <template <int> typename Mma>
void prefill_of(const AttentionForwardParams& p, Stream stream) {
  if (p.in.head_dim <= 64) return launch_prefill<Mma<64>, 64>(p, stream);
  if (p.in.head_dim <= 96) return launch_prefill<Mma<96>, 96>(p, stream);
  return launch_prefill<Mma<128>, 128>(p, stream);
}

template <int kD>
using AmpereHalf = AmpereMma<__half, kD>;
template <int kD>
using AmpereBFloat = AmpereMma<__nv_bfloat16, kD>;

}  // namespace

void attention_prefill(const AttentionForwardParams& p, TensorCores cores, Stream stream) {
  if (cores == TensorCores::kVolta)
    prefill_of<VoltaMma>(p, stream);
  else if (p.in.dtype == DType::kFloat16)
    prefill_of<AmpereHalf>(p, stream);
  else
    prefill_of<AmpereBFloat>(p, stream);
}

}  // namespace flexattn::cuda
