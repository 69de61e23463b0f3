// Which tensor-core kernel takes a call, and the map that its logits become.

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

// Head sizes between these run as the next one, with zeros for the channels that they lack.
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

// map[b, r, i, cell] = sum over heads, in their order, of exp(logit - lse). A thread per cell.
__global__ void map_of_logits(AttentionForwardParams p) {
  const AttentionInputs& in = p.in;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= in.batch * in.rows * p.images * p.map_size) return;
  const int64_t cell = at % p.map_size, image = at / p.map_size % p.images;
  const int64_t place = at / p.map_size / p.images, b = place / in.rows;
  const int64_t n = in.hr_rows ? row_at(in, b, place % in.rows) : in.queries - 1;
  const int32_t* range = p.map_ranges + (b * p.images + image) * 2;
  const int64_t j = range[0] + cell;
  float sum = 0;
  if (n >= 0 && j < range[1] && j >= first_key(in, b) && j < end_of_keys(in, b, n)) {
    const float* lse = static_cast<const float*>(p.map_over_all ? p.lse : p.lse_seq) + b * in.heads * in.queries + n;
    const float* logits =
        static_cast<const float*>(p.workspace) + (place * in.heads * p.images + image) * p.map_size + cell;
    for (int64_t head = 0; head < in.heads; ++head) {
      const float logit = logits[head * p.images * p.map_size];
      if (logit != -INFINITY) sum += expf(logit - lse[head * in.queries]);
    }
  }
  static_cast<float*>(p.map)[at] = sum;
}

}  // namespace

int64_t attention_prefill_workspace(const AttentionForwardParams& p) {
  return p.in.batch * p.in.rows * p.in.heads * p.images * p.map_size * static_cast<int64_t>(sizeof(float));
}

void attention_prefill(const AttentionForwardParams& p, TensorCores cores, Stream stream) {
  if (cores == TensorCores::kVolta)
    prefill_of<VoltaMma>(p, stream);
  else if (p.in.dtype == DType::kFloat16)
    prefill_of<AmpereHalf>(p, stream);
  else
    prefill_of<AmpereBFloat>(p, stream);
  constexpr int kThreads = 128;
  launch("hierarchical_attention (map)", map_of_logits,
         blocks_for(p.in.batch * p.in.rows * p.images * p.map_size, kThreads), kThreads, 0, stream, p);
}

}  // namespace flexattn::cuda
