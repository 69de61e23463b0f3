// N x (N+M) attention for any head size and dtype: a warp per query row, an online softmax over 32 keys at a time.
// Simple on purpose: the yardstick for the faster kernels, and the path for calls that they do not support.

#include "attention_generic.h"
#include "attention_map.cuh"

namespace flexattn::cuda {
namespace {

// The softmax of a warp's row, and its output.
template <typename A>
struct WarpSoftmax {
  A* out;      // [d] in shared memory, not normalised
  A* factors;  // [32] in shared memory
  SoftmaxState<A> state;

  // Add `keys` keys: lane j brings the logit of key j (-inf = hidden), value(j) is the row of its values.
  template <typename Value>
  __device__ void step(A logit, int keys, int64_t d, const Value& value) {
    const A rescale = state.raise_max(warp_max(logit)), weight = state.weight(logit);
    state.row_sum += warp_sum(weight);
    add_rows(out, rescale, weight, factors, keys, d, value);
  }

  __device__ A output(int64_t c) const { return state.average(out[c]); }
};

// Shared memory per warp: query [d], output [d], the output over the sequence alone [d], factors [32].
FLEXATTN_HOST_DEVICE constexpr int64_t scratch_size(int64_t d) { return 3 * d + kWarp; }

template <typename T, typename A>
__device__ void attend_sequence(const AttentionInputs& in, int64_t b, int64_t kv_head, int64_t n, const A* query,
                                WarpSoftmax<A>& softmax) {
  check_ranges(in, b);
  const KeyInterval keys = keys_of_query(in, b, n);
  const int64_t d = in.head_dim;
  const A softcap = static_cast<A>(in.softcap * kLog2e);
  for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kWarp) {
    const int64_t j = j0 + lane();
    const bool seen = j < keys.end && unmasked(in, b, j);
    const A logit =
        seen ? cap(dot(query, row_of<T>(in.k, in.k_strides, b, kv_head, j), d), softcap) : minus_infinity<A>();
    softmax.step(logit, lanes_used(j0, keys.end), d,
                 [&](int i) { return row_of<T>(in.v, in.v_strides, b, kv_head, j0 + i); });
  }
}

template <typename T, typename A>
__device__ void attend_hr(const AttentionInputs& in, int64_t b, int64_t kv_head, const int32_t* bits, const A* query,
                          WarpSoftmax<A>& softmax) {
  const int64_t count = hr_keys(in, b), d = in.head_dim;
  const A softcap = static_cast<A>(in.softcap * kLog2e);
  for (int64_t m0 = 0; m0 < count; m0 += kWarp) {
    const int64_t m = m0 + lane();
    const bool seen = m < count && (!bits || bit(bits, m));
    const A logit = seen ? cap(dot(query, row_of<T>(in.k_hr, in.k_hr_strides, 0, kv_head, slot(in, b, m)), d), softcap)
                         : minus_infinity<A>();
    softmax.step(logit, lanes_used(m0, count), d,
                 [&](int i) { return row_of<T>(in.v_hr, in.v_hr_strides, 0, kv_head, slot(in, b, m0 + i)); });
  }
}

template <typename T>
__global__ void attention_rows(AttentionForwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_in_block();  // in [B, H, N]
  if (row >= in.batch * in.heads * in.queries) return;  // a whole warp; no barrier of the block follows
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads;
  const int64_t kv_head = head / (in.heads / in.kv_heads), d = in.head_dim;
  A* query = shared_memory<A>() + warp_in_block() * scratch_size(d);  // times scale and log2(e)
  A* plain = query + 2 * d;
  WarpSoftmax<A> softmax{query + d, query + 3 * d};
  const T* q = row_of<T>(in.q, in.q_strides, b, head, n);
  for (int64_t c = lane(); c < d; c += kWarp) {
    query[c] = static_cast<A>(in.scale * kLog2e) * widen(q[c]);
    softmax.out[c] = 0;
  }
  __syncwarp();

  attend_sequence<T>(in, b, kv_head, n, query, softmax);
  const A lse_seq = softmax.state.log_sum_exp();
  const int64_t r = hr_row_of_query(in, b, n);
  const A alpha = r >= 0 ? mixing<A>(in, b) : A(1);
  if (r >= 0) {
    for (int64_t c = lane(); c < d; c += kWarp) plain[c] = softmax.output(c);
    attend_hr<T>(in, b, kv_head, row_bits(in, b, r), query, softmax);
  }

  T* out = static_cast<T*>(p.out) + ((b * in.queries + n) * in.heads + head) * d;
  for (int64_t c = lane(); c < d; c += kWarp) {
    const A full = softmax.output(c);
    out[c] = narrow<T>(alpha == A(1) ? full : alpha * full + (A(1) - alpha) * plain[c]);
  }
  if (lane() == 0) {
    static_cast<A*>(p.lse)[row] = softmax.state.log_sum_exp();
    static_cast<A*>(p.lse_seq)[row] = lse_seq;
  }
}

// The map; its logits are computed once more. A thread per cell.
template <typename T>
__global__ void attention_map(AttentionForwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= map_cells(p)) return;
  const MapCell cell = map_cell(p, index);
  const auto logit = [&](int64_t head) {
    const T* q = row_of<T>(in.q, in.q_strides, cell.b, head, cell.query);
    const T* k = row_of<T>(in.k, in.k_strides, cell.b, head / (in.heads / in.kv_heads), cell.key);
    A product = 0;
    for (int64_t c = 0; c < in.head_dim; ++c) product += widen(q[c]) * widen(k[c]);
    return cap(static_cast<A>(in.scale * kLog2e) * product, static_cast<A>(in.softcap * kLog2e));
  };
  write_map_cell<A, 1>(p, cell, logit, [&](int64_t head) { return lse_of_map<A>(p, cell, head); });
}

template <typename T>
void forward(const AttentionForwardParams& p, Stream stream) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const size_t scratch = scratch_size(in.head_dim) * sizeof(A);
  const int warps = warps_that_fit("hierarchical_attention", scratch);
  launch("hierarchical_attention", attention_rows<T>, blocks_for(in.batch * in.heads * in.queries, warps),
         warps * kWarp, warps * scratch, stream, p);
  constexpr int kThreads = 128;
  launch("hierarchical_attention (map)", attention_map<T>, blocks_for(map_cells(p), kThreads), kThreads, 0, stream, p);
}

}  // namespace

void attention_generic(const AttentionForwardParams& params, Stream stream) {
  dispatch(params.in.dtype, [&](auto value) { forward<decltype(value)>(params, stream); });
}

}  // namespace flexattn::cuda
