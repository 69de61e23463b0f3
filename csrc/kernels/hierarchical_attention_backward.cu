// Gradients of N x (N+M) attention, recomputed from the log-sum-exps; no atomics, every sum in one order.
//
//   grad_query_rows    a warp per query row:     D of both softmaxes, then grad_q
//   grad_sequence_keys a warp per sequence key:  grad_k, grad_v over the rows that see it
//   grad_pool_slots    a warp per pool slot:     grad_k_hr, grad_v_hr over samples and rows that see it
//
// The formulas stand in csrc/cpu/hierarchical_attention_backward.cpp.

#include "flexattn/hierarchical_attention.h"
#include "launch.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

// What the probabilities of one row are made of.
template <typename A>
struct RowState {
  A lse_seq, lse, d_seq, d_full, plain_weight, full_weight;

  // P_seq of a key with this logit; 0 where the row sees no sequence key.
  __device__ A seq(A logit) const { return lse_seq == minus_infinity<A>() ? A(0) : exp(logit - lse_seq); }
  __device__ A all(A logit) const { return lse == minus_infinity<A>() ? A(0) : exp(logit - lse); }
  // Weight of a sequence key in the output, and the gradient of its logit.
  __device__ A seq_weight(A logit) const { return plain_weight * seq(logit) + full_weight * all(logit); }
  __device__ A seq_gradient(A logit, A dp) const {
    return plain_weight * seq(logit) * (dp - d_seq) + full_weight * all(logit) * (dp - d_full);
  }
  __device__ A hr_gradient(A logit, A dp) const { return full_weight * all(logit) * (dp - d_full); }
};

template <typename A>
__device__ RowState<A> row_state(const AttentionBackwardParams& p, int64_t b, int64_t head, int64_t n, bool sees_hr) {
  const int64_t at = (b * p.in.heads + head) * p.in.queries + n;
  const A* delta = static_cast<const A*>(p.delta) + at * 2;
  const A alpha = sees_hr ? (p.in.alpha ? static_cast<A>(p.in.alpha[b]) : A(1)) : A(0);
  return {static_cast<const A*>(p.lse_seq)[at], static_cast<const A*>(p.lse)[at], delta[1], delta[0], A(1) - alpha, alpha};
}

template <typename T>
__device__ const T* grad_row(const AttentionBackwardParams& p, int64_t b, int64_t head, int64_t n) {
  return row_of<T>(p.grad_out, p.grad_out_strides, b, head, n);
}

// total[c] += sum over lanes j < items of x_j * row(j)[c]; lane c owns the channels c, c+32, ...
template <typename A, typename Row>
__device__ void add_rows(A* total, A x, int items, int64_t d, const Row& row) {
  for (int64_t c0 = 0; c0 < d; c0 += kWarp) {
    const int64_t c = c0 + lane();
    A sum = 0;
    for (int j = 0; j < items; ++j) {
      const A xj = __shfl_sync(kAllLanes, x, j);
      if (c < d && xj != A(0)) sum += xj * widen(row(j)[c]);
    }
    if (c < d) total[c] += sum;
  }
}

// Shared memory per warp: query [d], grad_out [d], grad_q [d].
template <typename T>
__global__ void grad_query_rows(AttentionBackwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_in_block();
  if (row >= in.batch * in.heads * in.queries) return;
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads;
  const int64_t group = head / (in.heads / in.kv_heads), d = in.head_dim;
  A* query = shared_memory<A>() + warp_in_block() * 3 * d;
  A *grad = query + d, *grad_q = query + 2 * d;
  const T *q = row_of<T>(in.q, in.q_strides, b, head, n), *g = grad_row<T>(p, b, head, n);
  for (int64_t c = lane(); c < d; c += kWarp) {
    query[c] = widen(q[c]);
    grad[c] = widen(g[c]);
    grad_q[c] = 0;
  }
  __syncwarp();
  const int64_t listed = listed_row(in, b, n), end = end_of_keys(in, b, n), count = listed >= 0 ? hr_keys(in, b) : 0;
  const int32_t* bits = listed >= 0 ? row_bits(in, b, listed) : nullptr;
  const int32_t* slots = in.hr_slots ? in.hr_slots + b * in.selected : nullptr;
  const A scale = static_cast<A>(in.scale);
  RowState<A> state = row_state<A>(p, b, head, n, listed >= 0);

  A d_seq = 0, d_full = 0;
  for (int64_t j = first_key(in, b) + lane(); j < end; j += kWarp) {
    if (!unmasked(in, b, j)) continue;
    const A logit = scale * dot(query, row_of<T>(in.k, in.k_strides, b, group, j), d);
    const A dp = dot(grad, row_of<T>(in.v, in.v_strides, b, group, j), d);
    d_seq += state.seq(logit) * dp;
    d_full += state.all(logit) * dp;
  }
  for (int64_t m = lane(); m < count; m += kWarp) {
    if (bits && !bit(bits, m)) continue;
    const A logit = scale * dot(query, row_of<T>(in.k_hr, in.k_hr_strides, 0, group, slots[m]), d);
    d_full += state.all(logit) * dot(grad, row_of<T>(in.v_hr, in.v_hr_strides, 0, group, slots[m]), d);
  }
  state.d_seq = warp_sum(d_seq);
  state.d_full = warp_sum(d_full);
  if (lane() == 0) {
    A* delta = static_cast<A*>(p.delta) + row * 2;  // row runs over [B, H, N]
    delta[0] = state.d_full;
    delta[1] = state.d_seq;
  }

  for (int64_t j0 = first_key(in, b); j0 < end; j0 += kWarp) {
    const int64_t j = j0 + lane();
    A ds = 0;
    if (j < end && unmasked(in, b, j)) {
      const A logit = scale * dot(query, row_of<T>(in.k, in.k_strides, b, group, j), d);
      ds = scale * state.seq_gradient(logit, dot(grad, row_of<T>(in.v, in.v_strides, b, group, j), d));
    }
    add_rows(grad_q, ds, static_cast<int>(min(end - j0, int64_t(kWarp))), d,
             [&](int i) { return row_of<T>(in.k, in.k_strides, b, group, j0 + i); });
  }
  for (int64_t m0 = 0; m0 < count; m0 += kWarp) {
    const int64_t m = m0 + lane();
    A ds = 0;
    if (m < count && (!bits || bit(bits, m))) {
      const A logit = scale * dot(query, row_of<T>(in.k_hr, in.k_hr_strides, 0, group, slots[m]), d);
      ds = scale * state.hr_gradient(logit, dot(grad, row_of<T>(in.v_hr, in.v_hr_strides, 0, group, slots[m]), d));
    }
    add_rows(grad_q, ds, static_cast<int>(min(count - m0, int64_t(kWarp))), d,
             [&](int i) { return row_of<T>(in.k_hr, in.k_hr_strides, 0, group, slots[m0 + i]); });
  }
  T* result = static_cast<T*>(p.grad_q) + row * d;
  for (int64_t c = lane(); c < d; c += kWarp) result[c] = narrow<T>(grad_q[c]);
}

// Shared memory per warp: key [d], value [d], grad_k [d], grad_v [d].
template <typename T, typename A>
__device__ void load_key(A* shared, const T* k, const T* v, int64_t d) {
  for (int64_t c = lane(); c < d; c += kWarp) {
    shared[c] = widen(k[c]);
    shared[d + c] = widen(v[c]);
    shared[2 * d + c] = 0;
    shared[3 * d + c] = 0;
  }
  __syncwarp();
}

template <typename T, typename A>
__device__ void store_key(const A* shared, void* grad_k, void* grad_v, int64_t at, int64_t d) {
  for (int64_t c = lane(); c < d; c += kWarp) {
    static_cast<T*>(grad_k)[at + c] = narrow<T>(shared[2 * d + c]);
    static_cast<T*>(grad_v)[at + c] = narrow<T>(shared[3 * d + c]);
  }
}

// Whether a row sees HR keys, asked by single lanes: the search of listed_row without the help of the warp.
__device__ inline bool sees_hr(const AttentionInputs& in, int64_t b, int64_t n) {
  if (hr_keys(in, b) == 0) return false;
  if (in.hr_from) return n >= in.hr_from[b];
  for (int64_t r = 0; in.hr_rows && r < in.rows; ++r)
    if (in.hr_rows[b * in.rows + r] == n) return true;
  return false;
}

template <typename T>
__global__ void grad_sequence_keys(AttentionBackwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_in_block();
  if (item >= in.batch * in.kv_heads * in.keys) return;
  const int64_t j = item % in.keys, group = item / in.keys % in.kv_heads, b = item / in.keys / in.kv_heads, d = in.head_dim;
  A* key = shared_memory<A>() + warp_in_block() * 4 * d;
  load_key<T>(key, row_of<T>(in.k, in.k_strides, b, group, j), row_of<T>(in.v, in.v_strides, b, group, j), d);
  const A scale = static_cast<A>(in.scale);
  // The first query that stands at j or later.
  const int64_t first = max(j - (in.kv_len[b] - in.queries), int64_t(0)), heads = in.heads / in.kv_heads;
  if (j >= first_key(in, b) && unmasked(in, b, j))
    for (int64_t head = group * heads; head < (group + 1) * heads; ++head)
      for (int64_t n0 = first; n0 < in.queries; n0 += kWarp) {
        const int64_t n = n0 + lane();
        A weight = 0, ds = 0;
        if (n < in.queries) {
          const RowState<A> state = row_state<A>(p, b, head, n, sees_hr(in, b, n));
          const A logit = scale * dot(key, row_of<T>(in.q, in.q_strides, b, head, n), d);
          weight = state.seq_weight(logit);
          ds = scale * state.seq_gradient(logit, dot(key + d, grad_row<T>(p, b, head, n), d));
        }
        const int items = static_cast<int>(min(in.queries - n0, int64_t(kWarp)));
        add_rows(key + 2 * d, ds, items, d, [&](int i) { return row_of<T>(in.q, in.q_strides, b, head, n0 + i); });
        add_rows(key + 3 * d, weight, items, d, [&](int i) { return grad_row<T>(p, b, head, n0 + i); });
      }
  store_key<T>(key, p.grad_k, p.grad_v, item * d, d);
}

__global__ void clear_slot_table(int32_t* table, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) table[i] = -1;
}

__global__ void fill_slot_table(AttentionInputs in, int32_t* table) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, b = blockIdx.y;
  if (m < hr_keys(in, b)) table[b * in.pool + in.hr_slots[b * in.selected + m]] = static_cast<int32_t>(m);
}

template <typename T>
__global__ void grad_pool_slots(AttentionBackwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_in_block();
  if (item >= in.pool * in.kv_heads) return;
  const int64_t group = item % in.kv_heads, slot = item / in.kv_heads, d = in.head_dim, heads = in.heads / in.kv_heads;
  A* key = shared_memory<A>() + warp_in_block() * 4 * d;
  load_key<T>(key, row_of<T>(in.k_hr, in.k_hr_strides, 0, group, slot), row_of<T>(in.v_hr, in.v_hr_strides, 0, group, slot), d);
  const A scale = static_cast<A>(in.scale);
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t m = p.slot_to_key[b * in.pool + slot];
    if (m < 0) continue;
    // Rows: those listed, or all from hr_from on.
    const int64_t first = in.hr_rows ? 0 : in.hr_from[b], end = in.hr_rows ? in.rows : in.queries;
    const auto query = [&](int64_t i) { return in.hr_rows ? in.hr_rows[b * in.rows + i] : i; };
    for (int64_t head = group * heads; head < (group + 1) * heads; ++head)
      for (int64_t i0 = first; i0 < end; i0 += kWarp) {
        const int64_t i = i0 + lane(), n = i < end ? query(i) : -1;
        A weight = 0, ds = 0;
        const int32_t* bits = n >= 0 ? row_bits(in, b, in.hr_rows ? i : 0) : nullptr;
        if (n >= 0 && (!bits || bit(bits, m))) {
          const RowState<A> state = row_state<A>(p, b, head, n, true);
          const A logit = scale * dot(key, row_of<T>(in.q, in.q_strides, b, head, n), d);
          weight = state.full_weight * state.all(logit);
          ds = scale * state.hr_gradient(logit, dot(key + d, grad_row<T>(p, b, head, n), d));
        }
        const int items = static_cast<int>(min(end - i0, int64_t(kWarp)));
        // A row of -1 has weight 0 and is skipped before it is read.
        add_rows(key + 2 * d, ds, items, d, [&](int k) { return row_of<T>(in.q, in.q_strides, b, head, query(i0 + k)); });
        add_rows(key + 3 * d, weight, items, d, [&](int k) { return grad_row<T>(p, b, head, query(i0 + k)); });
      }
  }
  store_key<T>(key, p.grad_k_hr, p.grad_v_hr, item * d, d);  // item runs over [P, Hkv]
}

template <typename T>
void backward(const AttentionBackwardParams& p, Stream stream) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  constexpr int kThreads = kWarpsPerBlock * kWarp;
  const size_t row_bytes = kWarpsPerBlock * in.head_dim * sizeof(A);
  launch("grad_query_rows", grad_query_rows<T>, blocks_for(in.batch * in.heads * in.queries, kWarpsPerBlock), kThreads,
         3 * row_bytes, stream, p);
  launch("grad_sequence_keys", grad_sequence_keys<T>, blocks_for(in.batch * in.kv_heads * in.keys, kWarpsPerBlock), kThreads,
         4 * row_bytes, stream, p);
  if (!in.k_hr) return;
  launch("clear_slot_table", clear_slot_table, blocks_for(in.batch * in.pool, kThreads), kThreads, 0, stream, p.slot_to_key,
         in.batch * in.pool);
  launch("fill_slot_table", fill_slot_table, dim3(blocks_for(in.selected, kThreads), static_cast<unsigned>(in.batch)), kThreads, 0,
         stream, in, p.slot_to_key);
  launch("grad_pool_slots", grad_pool_slots<T>, blocks_for(in.pool * in.kv_heads, kWarpsPerBlock), kThreads, 4 * row_bytes, stream, p);
}

}  // namespace

void hierarchical_attention_backward(const AttentionBackwardParams& params, Stream stream) {
  dispatch(params.in.dtype, [&](auto value) { backward<decltype(value)>(params, stream); });
}

}  // namespace flexattn::cuda
