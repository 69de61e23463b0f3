// N x (N+M) attention for any head size and dtype: a warp per query row, an online softmax over 32 keys at a time.
// Straightforward on purpose: the yardstick of faster kernels, and the path for what they do not take.

#include "attention_generic.h"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

// A warp's running softmax.
template <typename A>
struct OnlineSoftmax {
  A* out;      // [d] in shared memory: the output, not yet divided by `sum`
  A* factors;  // [32] in shared memory
  A largest = minus_infinity<A>();
  A sum = 0;

  // Takes in one logit per lane (-inf = hidden); value(j) is the row of values of lane j's key.
  template <typename Value>
  __device__ void absorb(A logit, int keys, int64_t d, const Value& value) {
    const A highest = larger(largest, warp_max(logit));
    if (highest == minus_infinity<A>()) return;  // nothing seen so far: exp(-inf - -inf) is no number
    const A shrink = exp(largest - highest), weight = exp(logit - highest);
    largest = highest;
    sum = sum * shrink + warp_sum(weight);
    add_rows(out, shrink, weight, factors, keys, d, value);
  }

  __device__ A normalised(int64_t c) const { return sum == A(0) ? A(0) : out[c] / sum; }
  __device__ A log_sum_exp() const { return sum == A(0) ? minus_infinity<A>() : largest + log(sum); }
};

// Shared memory per warp: query [d], output [d], the output over the sequence alone [d], factors [32].
FLEXATTN_HOST_DEVICE constexpr int64_t scratch_size(int64_t d) { return 3 * d + kWarp; }

template <typename T>
__global__ void attention_rows(AttentionForwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_in_block();
  if (row >= in.batch * in.heads * in.queries) return;  // a whole warp; no barrier of the block follows
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads;
  const int64_t group = head / (in.heads / in.kv_heads), d = in.head_dim;
  const A scale = static_cast<A>(in.scale);
  A* query = shared_memory<A>() + warp_in_block() * scratch_size(d);
  A* plain = query + 2 * d;
  OnlineSoftmax<A> softmax{query + d, query + 3 * d};
  const T* q = row_of<T>(in.q, in.q_strides, b, head, n);
  for (int64_t c = lane(); c < d; c += kWarp) {
    query[c] = widen(q[c]);
    softmax.out[c] = 0;
  }
  __syncwarp();

  const int64_t end = end_of_keys(in, b, n);
  for (int64_t j0 = first_key(in, b); j0 < end; j0 += kWarp) {
    const int64_t j = j0 + lane();
    const bool seen = j < end && unmasked(in, b, j);
    const A logit = seen ? scale * dot(query, row_of<T>(in.k, in.k_strides, b, group, j), d) : minus_infinity<A>();
    softmax.absorb(logit, lanes_used(j0, end), d,
                   [&](int i) { return row_of<T>(in.v, in.v_strides, b, group, j0 + i); });
  }
  const A lse_seq = softmax.log_sum_exp();

  const int64_t listed = listed_row(in, b, n);
  const A alpha = listed >= 0 ? mixing<A>(in, b) : A(1);
  if (listed >= 0) {
    for (int64_t c = lane(); c < d; c += kWarp) plain[c] = softmax.normalised(c);
    const int32_t* bits = row_bits(in, b, listed);
    const int64_t count = hr_keys(in, b);
    for (int64_t m0 = 0; m0 < count; m0 += kWarp) {
      const int64_t m = m0 + lane();
      const bool seen = m < count && (!bits || bit(bits, m));
      const A logit = seen ? scale * dot(query, row_of<T>(in.k_hr, in.k_hr_strides, 0, group, slot(in, b, m)), d)
                           : minus_infinity<A>();
      softmax.absorb(logit, lanes_used(m0, count), d,
                     [&](int i) { return row_of<T>(in.v_hr, in.v_hr_strides, 0, group, slot(in, b, m0 + i)); });
    }
  }

  T* out = static_cast<T*>(p.out) + ((b * in.queries + n) * in.heads + head) * d;
  for (int64_t c = lane(); c < d; c += kWarp) {
    const A full = softmax.normalised(c);
    out[c] = narrow<T>(alpha == A(1) ? full : alpha * full + (A(1) - alpha) * plain[c]);
  }
  if (lane() == 0) {
    static_cast<A*>(p.lse)[row] = softmax.log_sum_exp();  // row runs over [B, H, N]
    static_cast<A*>(p.lse_seq)[row] = lse_seq;
  }
}

// map[b, r, i, cell] = sum over heads, in their order, of exp(logit - lse). A thread per cell.
template <typename T>
__global__ void attention_map(AttentionForwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= in.batch * in.rows * p.images * p.map_size) return;
  const int64_t cell = at % p.map_size, image = at / p.map_size % p.images;
  const int64_t r = at / p.map_size / p.images % in.rows, b = at / p.map_size / p.images / in.rows;
  const int64_t n = in.hr_rows ? row_at(in, b, r) : in.queries - 1;
  const int32_t* range = p.map_ranges + (b * p.images + image) * 2;
  require("hierarchical_attention: map_ranges", range[0], 0, in.keys);
  require("hierarchical_attention: map_ranges", range[1], range[0], in.keys);
  const int64_t j = range[0] + cell;
  A sum = 0;
  if (n >= 0 && j < range[1] && j >= first_key(in, b) && j < end_of_keys(in, b, n) && unmasked(in, b, j)) {
    for (int64_t head = 0; head < in.heads; ++head) {
      const A lse = static_cast<const A*>(p.map_over_all ? p.lse : p.lse_seq)[(b * in.heads + head) * in.queries + n];
      const T* q = row_of<T>(in.q, in.q_strides, b, head, n);
      const T* k = row_of<T>(in.k, in.k_strides, b, head / (in.heads / in.kv_heads), j);
      A logit = 0;
      for (int64_t c = 0; c < in.head_dim; ++c) logit += widen(q[c]) * widen(k[c]);
      sum += exp(static_cast<A>(in.scale) * logit - lse);
    }
  }
  static_cast<A*>(p.map)[at] = sum;
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
  launch("hierarchical_attention (map)", attention_map<T>,
         blocks_for(in.batch * in.rows * p.images * p.map_size, kThreads), kThreads, 0, stream, p);
}

}  // namespace

void attention_generic(const AttentionForwardParams& params, Stream stream) {
  dispatch(params.in.dtype, [&](auto value) { forward<decltype(value)>(params, stream); });
}

}  // namespace flexattn::cuda
