// N x (N+M) attention for any head size and dtype: a warp per query row, an online softmax over 32 keys at a time.
// Straightforward on purpose: the tensor-core kernels are measured against it and fall back to it.

#include "flexattn/hierarchical_attention.h"
#include "launch.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

// A warp's running softmax. The unnormalised output [d] lies in shared memory; lane c owns the channels c, c+32, ...
template <typename A>
struct OnlineSoftmax {
  A largest = minus_infinity<A>();
  A sum = 0;
  A* out;

  // Takes in one logit per lane (-inf = hidden); value(j) is the row of values of lane j's key.
  template <typename T, typename Value>
  __device__ void absorb(A logit, int keys, int64_t d, const Value& value) {
    const A highest = max(largest, warp_max(logit));
    if (highest == minus_infinity<A>()) return;  // nothing seen so far
    const A shrink = exp(largest - highest), weight = exp(logit - highest);
    largest = highest;
    sum = sum * shrink + warp_sum(weight);
    for (int64_t c0 = 0; c0 < d; c0 += kWarp) {
      const int64_t c = c0 + lane();
      A total = c < d ? out[c] * shrink : A(0);
      for (int j = 0; j < keys; ++j) {
        const A w = __shfl_sync(kAllLanes, weight, j);
        if (c < d && w != A(0)) total += w * widen(value(j)[c]);
      }
      if (c < d) out[c] = total;
    }
    __syncwarp();
  }

  __device__ A log_sum_exp() const { return sum > 0 ? largest + log(sum) : minus_infinity<A>(); }
};

// Shared memory per warp: query [d], output [d], and the plain output [d] for rows that mix.
template <typename T>
__global__ void attention_rows(AttentionForwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_in_block();
  if (row >= in.batch * in.heads * in.queries) return;  // a whole warp: no barrier of the block follows
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads;
  const int64_t group = head / (in.heads / in.kv_heads), d = in.head_dim;
  A* query = shared_memory<A>() + warp_in_block() * 3 * d;
  A* plain = query + 2 * d;
  OnlineSoftmax<A> softmax;
  softmax.out = query + d;
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
    const A logit = seen ? static_cast<A>(in.scale) * dot(query, row_of<T>(in.k, in.k_strides, b, group, j), d) : minus_infinity<A>();
    softmax.template absorb<T>(logit, static_cast<int>(min(end - j0, int64_t(kWarp))), d,
                               [&](int i) { return row_of<T>(in.v, in.v_strides, b, group, j0 + i); });
  }
  const A lse_seq = softmax.log_sum_exp();
  const int64_t listed = listed_row(in, b, n);
  const A alpha = listed >= 0 && in.alpha ? static_cast<A>(in.alpha[b]) : A(1);
  if (listed >= 0) {
    for (int64_t c = lane(); c < d; c += kWarp) plain[c] = softmax.sum > 0 ? softmax.out[c] / softmax.sum : A(0);
    const int32_t* slots = in.hr_slots + b * in.selected;
    const int32_t* bits = row_bits(in, b, listed);
    const int64_t count = hr_keys(in, b);
    for (int64_t m0 = 0; m0 < count; m0 += kWarp) {
      const int64_t m = m0 + lane();
      const bool seen = m < count && (!bits || bit(bits, m));
      const A logit = seen ? static_cast<A>(in.scale) * dot(query, row_of<T>(in.k_hr, in.k_hr_strides, 0, group, slots[m]), d)
                           : minus_infinity<A>();
      softmax.template absorb<T>(logit, static_cast<int>(min(count - m0, int64_t(kWarp))), d,
                                 [&](int i) { return row_of<T>(in.v_hr, in.v_hr_strides, 0, group, slots[m0 + i]); });
    }
  }
  T* out = static_cast<T*>(p.out) + ((b * in.queries + n) * in.heads + head) * d;
  for (int64_t c = lane(); c < d; c += kWarp) {
    A value = softmax.sum > 0 ? softmax.out[c] / softmax.sum : A(0);
    if (alpha != A(1)) value = alpha * value + (A(1) - alpha) * plain[c];
    out[c] = narrow<T>(value);
  }
  if (lane() == 0) {
    const int64_t at = (b * in.heads + head) * in.queries + n;
    static_cast<A*>(p.lse)[at] = softmax.log_sum_exp();
    static_cast<A*>(p.lse_seq)[at] = lse_seq;
  }
}

// map[b, r, i, cell] = sum over heads, in their order, of exp(logit - lse). A thread per cell.
template <typename T>
__global__ void attention_map(AttentionForwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t picture = blockIdx.y % p.pictures, r = blockIdx.y / p.pictures, b = blockIdx.z;
  if (cell >= p.map_size) return;
  const int64_t n = in.hr_rows ? in.hr_rows[b * in.rows + r] : in.queries - 1;
  const int32_t* range = p.map_ranges + (b * p.pictures + picture) * 2;
  const int64_t j = range[0] + cell;
  A sum = 0;
  if (n >= 0 && j < range[1] && j >= first_key(in, b) && j < end_of_keys(in, b, n) && unmasked(in, b, j)) {
    for (int64_t head = 0; head < in.heads; ++head) {
      const int64_t at = (b * in.heads + head) * in.queries + n;
      const A lse = static_cast<const A*>(p.map_over_all ? p.lse : p.lse_seq)[at];
      const T* q = row_of<T>(in.q, in.q_strides, b, head, n);
      const T* k = row_of<T>(in.k, in.k_strides, b, head / (in.heads / in.kv_heads), j);
      sum += exp(static_cast<A>(in.scale) * dot_rows(q, k, in.head_dim) - lse);
    }
  }
  static_cast<A*>(p.map)[((b * in.rows + r) * p.pictures + picture) * p.map_size + cell] = sum;
}

template <typename T>
void forward(const AttentionForwardParams& p, Stream stream) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const size_t shared = kWarpsPerBlock * 3 * in.head_dim * sizeof(A);
  launch("attention_rows", attention_rows<T>, blocks_for(in.batch * in.heads * in.queries, kWarpsPerBlock),
         kWarpsPerBlock * kWarp, shared, stream, p);
  if (p.pictures > 0) {
    constexpr int kThreads = 128;
    const dim3 grid(blocks_for(p.map_size, kThreads), static_cast<unsigned>(in.rows * p.pictures), static_cast<unsigned>(in.batch));
    launch("attention_map", attention_map<T>, grid, kThreads, 0, stream, p);
  }
}

}  // namespace

void hierarchical_attention_forward(const AttentionForwardParams& params, Stream stream) {
  dispatch(params.in.dtype, [&](auto value) { forward<decltype(value)>(params, stream); });
}

}  // namespace flexattn::cuda
