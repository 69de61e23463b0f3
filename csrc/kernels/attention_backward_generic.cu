// Gradients of N x (N+M) attention, recomputed from the log-sum-exps; no atomics, every sum in one order.
//
//   grad_query_rows     a warp per query row:     D of both softmaxes, then grad_q
//   grad_sequence_keys  a warp per sequence key:  grad_k, grad_v over the rows that see it
//   grad_pool_slots     a warp per pool slot:     grad_k_hr, grad_v_hr over the samples that own it and their rows
//
//   out_i  = sum_j w_ij v_j           w_ij  = (1 - alpha) P_seq + alpha P_full
//   dv_j  += w_ij dout_i              dp_ij = dout_i . v_j
//   dk_j  += scale ds_ij q_i          ds_ij = (1 - alpha) P_seq (dp_ij - D_seq) + alpha P_full (dp_ij - D_full)
//   dq_i  += scale ds_ij k_j          D     = sum_j P_ij dp_ij, which is dout_i . out_i without alpha
//
// With a softcap, ds_ij is multiplied by the derivative of the capped logit.
//
// The forward pass writes lse == lse_seq for a row that sees no HR key, so that P_full == P_seq there and mixing
// changes nothing: no kernel has to ask which rows see HR keys for the weight of a sequence key.

#include "attention_backward.h"
#include "softmax.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

// What the probabilities of one query row are made of.
template <typename A>
struct RowState {
  A lse, lse_seq, d_full, d_seq, alpha, softcap;

  __device__ A logit(A scaled_product) const { return cap(scaled_product, softcap); }
  __device__ A full(A logit) const { return exp(logit - lse); }
  __device__ A seq(A logit) const { return exp(logit - lse_seq); }
  __device__ A seq_weight(A logit) const { return (A(1) - alpha) * seq(logit) + alpha * full(logit); }
  __device__ A seq_gradient(A logit, A dp) const {
    return slope_of_cap(logit, softcap) *
           ((A(1) - alpha) * seq(logit) * (dp - d_seq) + alpha * full(logit) * (dp - d_full));
  }
  __device__ A hr_weight(A logit) const { return alpha * full(logit); }
  __device__ A hr_gradient(A logit, A dp) const {
    return slope_of_cap(logit, softcap) * alpha * full(logit) * (dp - d_full);
  }
};

// D comes from row_states, where grad_query_rows has written it: of the softmax over all keys, then of the sequence's.
template <typename A>
__device__ RowState<A> row_state(const AttentionBackwardParams& p, int64_t b, int64_t head, int64_t n) {
  const int64_t at = (b * p.in.heads + head) * p.in.queries + n;
  const A* delta = static_cast<const A*>(p.row_states) + at * 2;
  return {
      static_cast<const A*>(p.lse)[at], static_cast<const A*>(p.lse_seq)[at], delta[0], delta[1], mixing<A>(p.in, b),
      static_cast<A>(p.in.softcap)};
}

template <typename T>
__device__ const T* query_row(const AttentionBackwardParams& p, int64_t b, int64_t head, int64_t n) {
  return row_of<T>(p.in.q, p.in.q_strides, b, head, n);
}

template <typename T>
__device__ const T* grad_row(const AttentionBackwardParams& p, int64_t b, int64_t head, int64_t n) {
  return row_of<T>(p.grad_out, p.grad_out_strides, b, head, n);
}

// Shared memory of a warp: query, grad_out, grad_q [d] for rows; key, value, grad_k, grad_v [d] for keys; factors [32].
FLEXATTN_HOST_DEVICE constexpr int64_t row_scratch(int64_t d) { return 3 * d + kWarp; }
FLEXATTN_HOST_DEVICE constexpr int64_t key_scratch(int64_t d) { return 4 * d + kWarp; }

template <typename T>
__global__ void grad_query_rows(AttentionBackwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_in_block();
  if (row >= in.batch * in.heads * in.queries) return;  // a whole warp; no barrier of the block follows
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads;
  const int64_t kv_head = head / (in.heads / in.kv_heads), d = in.head_dim;
  const A scale = static_cast<A>(in.scale);
  A* query = shared_memory<A>() + warp_in_block() * row_scratch(d);
  A *grad = query + d, *grad_q = query + 2 * d, *factors = query + 3 * d;
  for (int64_t c = lane(); c < d; c += kWarp) {
    query[c] = widen(query_row<T>(p, b, head, n)[c]);
    grad[c] = widen(grad_row<T>(p, b, head, n)[c]);
    grad_q[c] = 0;
  }
  __syncwarp();

  check_ranges(in, b);
  const KeyInterval seen = keys_of_query(in, b, n);
  const int64_t start = seen.begin, end = seen.end, r = hr_row_of_query(in, b, n);
  const int64_t count = r >= 0 ? hr_keys(in, b) : 0;
  const int32_t* bits = r >= 0 ? row_bits(in, b, r) : nullptr;
  const auto sees = [&](int64_t j) { return j < end && unmasked(in, b, j); };
  const auto sees_hr = [&](int64_t m) { return m < count && (!bits || bit(bits, m)); };
  const auto k = [&](int64_t j) { return row_of<T>(in.k, in.k_strides, b, kv_head, j); };
  const auto v = [&](int64_t j) { return row_of<T>(in.v, in.v_strides, b, kv_head, j); };
  const auto k_hr = [&](int64_t m) { return row_of<T>(in.k_hr, in.k_hr_strides, 0, kv_head, slot(in, b, m)); };
  const auto v_hr = [&](int64_t m) { return row_of<T>(in.v_hr, in.v_hr_strides, 0, kv_head, slot(in, b, m)); };

  RowState<A> state{static_cast<const A*>(p.lse)[row], static_cast<const A*>(p.lse_seq)[row], 0, 0, mixing<A>(in, b),
                    static_cast<A>(in.softcap)};
  // Of keys of the sequence, and of HR keys.
  const auto logit = [&](int64_t j) { return state.logit(scale * dot(query, k(j), d)); };
  const auto logit_hr = [&](int64_t m) { return state.logit(scale * dot(query, k_hr(m), d)); };
  if (p.out) {
    const T* out = static_cast<const T*>(p.out) + ((b * in.queries + n) * in.heads + head) * d;
    for (int64_t c = lane(); c < d; c += kWarp) state.d_full += grad[c] * widen(out[c]);
    state.d_seq = state.d_full;
  }
  for (int64_t j = start + lane(); !p.out && j < end; j += kWarp) {
    if (!sees(j)) continue;
    const A of_key = logit(j), dp = dot(grad, v(j), d);
    state.d_seq += state.seq(of_key) * dp;
    state.d_full += state.full(of_key) * dp;
  }
  for (int64_t m = lane(); !p.out && m < count; m += kWarp)
    if (sees_hr(m)) state.d_full += state.full(logit_hr(m)) * dot(grad, v_hr(m), d);
  state.d_seq = warp_sum(state.d_seq);
  state.d_full = warp_sum(state.d_full);
  if (lane() == 0) {
    A* delta = static_cast<A*>(p.row_states) + row * 2;  // row runs over [B, H, N]
    delta[0] = state.d_full;
    delta[1] = state.d_seq;
  }
  if (!p.grad_q) return;

  for (int64_t j0 = start; j0 < end; j0 += kWarp) {
    const int64_t j = j0 + lane();
    const A ds = sees(j) ? scale * state.seq_gradient(logit(j), dot(grad, v(j), d)) : A(0);
    add_rows(grad_q, A(1), ds, factors, lanes_used(j0, end), d, [&](int i) { return k(j0 + i); });
  }
  for (int64_t m0 = 0; m0 < count; m0 += kWarp) {
    const int64_t m = m0 + lane();
    const A ds = sees_hr(m) ? scale * state.hr_gradient(logit_hr(m), dot(grad, v_hr(m), d)) : A(0);
    add_rows(grad_q, A(1), ds, factors, lanes_used(m0, count), d, [&](int i) { return k_hr(m0 + i); });
  }
  T* result = static_cast<T*>(p.grad_q) + row * d;
  for (int64_t c = lane(); c < d; c += kWarp) result[c] = narrow<T>(grad_q[c]);
}

// A key with its value, and their gradients, in the shared memory of a warp.
template <typename T>
struct KeyGradient {
  using A = typename Accumulator<T>::type;
  A *key, *value, *grad_k, *grad_v, *factors;
  int64_t d;

  __device__ KeyGradient(const T* k, const T* v, int64_t d) : d(d) {
    key = shared_memory<A>() + warp_in_block() * key_scratch(d);
    value = key + d, grad_k = key + 2 * d, grad_v = key + 3 * d, factors = key + 4 * d;
    for (int64_t c = lane(); c < d; c += kWarp) {
      key[c] = widen(k[c]);
      value[c] = widen(v[c]);
      grad_k[c] = grad_v[c] = 0;
    }
    __syncwarp();
  }

  __device__ void store(void* to_k, void* to_v, int64_t at) const {
    for (int64_t c = lane(); c < d; c += kWarp) {
      static_cast<T*>(to_k)[at + c] = narrow<T>(grad_k[c]);
      static_cast<T*>(to_v)[at + c] = narrow<T>(grad_v[c]);
    }
  }
};

template <typename T>
__global__ void grad_sequence_keys(AttentionBackwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_in_block();  // over [B, Hkv, Nk]
  if (item >= in.batch * in.kv_heads * in.keys) return;
  const int64_t j = item % in.keys, kv_head = item / in.keys % in.kv_heads, b = item / in.keys / in.kv_heads,
                d = in.head_dim;
  const int64_t heads = in.heads / in.kv_heads;
  const A scale = static_cast<A>(in.scale);
  KeyGradient<T> key(row_of<T>(in.k, in.k_strides, b, kv_head, j), row_of<T>(in.v, in.v_strides, b, kv_head, j), d);
  QueryInterval queries = queries_of_keys(in, b, static_cast<int>(j), static_cast<int>(j));
  if (!unmasked(in, b, j)) queries.end = 0;
  const auto sees = [&](int64_t n) {
    if (n >= queries.end) return false;
    const KeyInterval keys = keys_of_query(in, b, n);
    return keys.begin <= j && j < keys.end;
  };
  for (int64_t head = kv_head * heads; head < (kv_head + 1) * heads; ++head)
    for (int64_t n0 = queries.begin; n0 < queries.end; n0 += kWarp) {
      const int64_t n = n0 + lane();
      A weight = 0, ds = 0;
      if (sees(n)) {
        const RowState<A> state = row_state<A>(p, b, head, n);
        const A logit = state.logit(scale * dot(key.key, query_row<T>(p, b, head, n), d));
        weight = state.seq_weight(logit);
        ds = scale * state.seq_gradient(logit, dot(key.value, grad_row<T>(p, b, head, n), d));
      }
      const int rows = lanes_used(n0, queries.end);
      add_rows(key.grad_k, A(1), ds, key.factors, rows, d, [&](int i) { return query_row<T>(p, b, head, n0 + i); });
      add_rows(key.grad_v, A(1), weight, key.factors, rows, d, [&](int i) { return grad_row<T>(p, b, head, n0 + i); });
    }
  key.store(p.grad_k, p.grad_v, item * d);
}

template <typename T>
__global__ void grad_pool_slots(AttentionBackwardParams p) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_in_block();  // over [P, Hkv]
  if (item >= in.pool * in.kv_heads) return;
  const int64_t kv_head = item % in.kv_heads, at = item / in.kv_heads, d = in.head_dim, heads = in.heads / in.kv_heads;
  const A scale = static_cast<A>(in.scale);
  KeyGradient<T> key(row_of<T>(in.k_hr, in.k_hr_strides, 0, kv_head, at),
                     row_of<T>(in.v_hr, in.v_hr_strides, 0, kv_head, at), d);
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t m = p.slot_to_key[b * in.pool + at];
    if (m < 0 || !(in.hr_rows || in.hr_from)) continue;
    // The rows that may see it: those listed, some of which are -1, or all from hr_from on.
    const int64_t first = in.hr_rows ? 0 : first_hr_query(in, b), end = in.hr_rows ? in.rows : in.queries;
    const auto query = [&](int64_t i) { return in.hr_rows ? query_at(in, b, i) : i; };
    const auto sees = [&](int64_t i) {
      if (i >= end || query(i) < 0) return false;
      const int32_t* bits = row_bits(in, b, in.hr_rows ? i : 0);
      return !bits || bit(bits, m);
    };
    for (int64_t head = kv_head * heads; head < (kv_head + 1) * heads; ++head)
      for (int64_t i0 = first; i0 < end; i0 += kWarp) {
        const int64_t i = i0 + lane();
        A weight = 0, ds = 0;
        if (sees(i)) {
          const int64_t n = query(i);
          const RowState<A> state = row_state<A>(p, b, head, n);
          const A logit = state.logit(scale * dot(key.key, query_row<T>(p, b, head, n), d));
          weight = state.hr_weight(logit);
          ds = scale * state.hr_gradient(logit, dot(key.value, grad_row<T>(p, b, head, n), d));
        }
        const int rows = lanes_used(i0, end);
        add_rows(key.grad_k, A(1), ds, key.factors, rows, d,
                 [&](int r) { return query_row<T>(p, b, head, query(i0 + r)); });
        add_rows(key.grad_v, A(1), weight, key.factors, rows, d,
                 [&](int r) { return grad_row<T>(p, b, head, query(i0 + r)); });
      }
  }
  key.store(p.grad_k_hr, p.grad_v_hr, item * d);
}

template <typename T>
void backward(const AttentionBackwardParams& p, Stream stream) {
  using A = typename Accumulator<T>::type;
  const AttentionInputs& in = p.in;
  const char* name = "hierarchical_attention_backward";
  const size_t per_row = row_scratch(in.head_dim) * sizeof(A), per_key = key_scratch(in.head_dim) * sizeof(A);
  const int warps = warps_that_fit(name, per_key), threads = warps * kWarp;
  launch(name, grad_query_rows<T>, blocks_for(in.batch * in.heads * in.queries, warps), threads, warps * per_row,
         stream, p);
  if (p.grad_k)
    launch(name, grad_sequence_keys<T>, blocks_for(in.batch * in.kv_heads * in.keys, warps), threads, warps * per_key,
           stream, p);
  if (p.grad_k_hr)
    launch(name, grad_pool_slots<T>, blocks_for(in.pool * in.kv_heads, warps), threads, warps * per_key, stream, p);
}

}  // namespace

void attention_backward_generic(const AttentionBackwardParams& params, Stream stream) {
  dispatch(params.in.dtype, [&](auto value) { backward<decltype(value)>(params, stream); });
}

}  // namespace flexattn::cuda
