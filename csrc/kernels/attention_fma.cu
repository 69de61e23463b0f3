// Choice and launch of the kernels without tensor cores: attention, and its map.

#include "attention_fma.h"

#include "attention_fma.cuh"

namespace flexattn::cuda {
namespace {

template <typename T, int kD>
void launch_fma(const AttentionForwardParams& p, Stream stream) {
  const BlockOrder order = row_order(p.in);
  launch("hierarchical_attention (fma)", prefill_fma<T, kD>, order.blocks(), kTileThreads,
         fma_shared_bytes<T>(p.in.selected), stream, p, order);
  launch("hierarchical_attention (map)", map_fma<T>, map_blocks(p), kTileThreads, sizeof(FmaMapShared<T>), stream, p);
}

// Other head sizes run as the next larger of these, with zeros for the missing channels.
template <typename T>
void fma_of(const AttentionForwardParams& p, Stream stream) {
  if (p.in.head_dim <= 64) return launch_fma<T, 64>(p, stream);
  if (p.in.head_dim <= 128) return launch_fma<T, 128>(p, stream);
  return launch_fma<T, 256>(p, stream);
}

}  // namespace

void attention_fma(const AttentionForwardParams& p, Stream stream) {
  switch (p.in.dtype) {
    case DType::kFloat32:
      return fma_of<float>(p, stream);
    case DType::kBFloat16:
      return fma_of<__nv_bfloat16>(p, stream);
    case DType::kFloat16:  // smaller heads run on tensor cores
      return launch_fma<__half, 256>(p, stream);
    case DType::kFloat64:  // the generic path
      return;
  }
}

}  // namespace flexattn::cuda
