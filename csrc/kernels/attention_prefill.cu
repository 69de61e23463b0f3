// Choice and launch of the tensor-core kernel, and the map from its logits.

#include "attention_prefill.cuh"
#include "attention_prefill.h"
#include "mma_ampere.cuh"
#include "mma_volta.cuh"

namespace flexattn::cuda {
namespace {

template <typename Mma, int kD>
void launch_prefill(const AttentionForwardParams& p, Stream stream) {
  const int64_t blocks = blocks_for(p.in.queries, kTileRows) * p.in.heads * p.in.batch;
  launch("hierarchical_attention (prefill)", prefill_tiles<Mma, kD>, blocks, kTileThreads,
         prefill_shared_bytes<Mma>(p.in.selected), stream, p);
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

// The map from the logits that prefill_tiles has kept. A thread per cell.
__global__ void map_of_logits(AttentionForwardParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= map_cells(p)) return;
  const MapCell cell = map_cell(p, index);
  const int64_t head_cells = p.images * p.map_size;
  const float* logits = static_cast<const float*>(p.workspace) +
                        (cell.b * p.in.rows + cell.r) * p.in.heads * head_cells + cell.image * p.map_size + cell.cell;
  write_map_cell<float, 8>(
      p, cell, [&](int64_t head) { return logits[head * head_cells]; },
      [&](int64_t head) { return lse_of_map<float>(p, cell, head); });
}

}  // namespace

int64_t attention_prefill_workspace(const AttentionForwardParams& p) {
  return map_cells(p) * p.in.heads * static_cast<int64_t>(sizeof(float));
}

void attention_prefill(const AttentionForwardParams& p, TensorCores cores, Stream stream) {
  if (cores == TensorCores::kVolta)
    prefill_of<VoltaMma>(p, stream);
  else if (p.in.dtype == DType::kFloat16)
    prefill_of<AmpereHalf>(p, stream);
  else
    prefill_of<AmpereBFloat>(p, stream);
  constexpr int kThreads = 128;
  launch("hierarchical_attention (map)", map_of_logits, blocks_for(map_cells(p), kThreads), kThreads, 0, stream, p);
}

}  // namespace flexattn::cuda
