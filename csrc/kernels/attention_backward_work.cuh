// What the kernels of the backward pass in tiles share: how queries weigh their keys, and by which queries the keys of
// a block are seen.
//
// With alpha, the weight of a sequence key is (1 - alpha) P_seq + alpha P_full, and each softmax has its own D (see
// attention_backward_generic.cu). In one row, P_full is a constant times P_seq, so the two together are one exponential
// with a log-sum-exp and a D of its own. It is found in a pass over the keys, RowStates::add_to_d, instead of
// grad_row_states; nothing after it knows of alpha.
#pragma once

#include "row_steps.cuh"

namespace flexattn::cuda {

// The weight of a key is 2^(logit - lse), logits in base 2, and its logit's gradient is weight (dP - d).
struct alignas(8) Weighing {
  float lse, d;
};

// How a query weighs the keys of the sequence, and the HR keys.
struct alignas(16) QueryState {
  Weighing sequence, hr;
};

// Fold alpha, 0 to 1, into the weighing. full, plain: of the softmax over all keys, and of the one over the sequence,
// whose d is the sum of P dP over their keys.
__device__ inline QueryState mix(const Weighing& full, const Weighing& plain, float alpha) {
  const Weighing hr{full.lse - log2(alpha), full.d};
  if (alpha == 1.f || plain.lse == -INFINITY) return {full, hr};
  const float of_full = alpha * exp2(plain.lse - full.lse), of_plain = 1.f - alpha, both = of_full + of_plain;
  return {{plain.lse - log2(both), (of_full * full.d + of_plain * plain.d) / both}, hr};
}

// Replace scores by the weights of their keys. weighing(i), visible(i): of score i.
template <int n, typename WeighingOf, typename Visible>
__device__ __forceinline__ void weigh(float (&s)[n], float scale, const WeighingOf& weighing, const Visible& visible) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float weight = exp2_approx(scale * s[i] - weighing(i).lse);
    s[i] = visible(i) ? weight : 0.f;
  }
}

// A hidden key may be NaN: its weight decides.
__device__ __forceinline__ float gradient_of_logit(float dp, float weight, const Weighing& weighing) {
  return weight == 0.f ? 0.f : weight * (dp - weighing.d);
}
// Replace dP by the gradients of the logits.
template <int n, typename WeighingOf>
__device__ __forceinline__ void differentiate(float (&dp)[n], const float (&weights)[n], const WeighingOf& weighing) {
#pragma unroll
  for (int i = 0; i < n; ++i) dp[i] = gradient_of_logit(dp[i], weights[i], weighing(i));
}

// Write factor * sum to the lane's rows, to(which); null for one that does not exist.
template <typename Rows, typename To>
__device__ __forceinline__ void store_rows(const float (&sum)[Rows::kOutputs], float factor, int d, const To& to) {
  using T = typename Rows::Element;
#pragma unroll
  for (int which = 0; which < Rows::kLaneRows; ++which) {
    T* row = to(which);
    if (!row) continue;
#pragma unroll
    for (int i = 0; i < Rows::kOutputs; i += Rows::kNeighbours) {
      const int channel = Rows::channel_of_output(i) + Rows::channel_of_lane();
      if (Rows::row_of(i) == which && channel < d) store_scaled<Rows::kNeighbours>(row + channel, factor, sum + i);
    }
  }
}

__device__ inline int64_t state_index(const AttentionInputs& in, int64_t b, int64_t head, int64_t n) {
  return (b * in.heads + head) * in.queries + n;
}
__device__ inline QueryState* states_of(const AttentionBackwardParams& p) {
  return static_cast<QueryState*>(p.row_states);
}

// ---------------------------------------------------------------------------------------------------- all queries

// Check what the kernels after this one rely on, in shares of a query each.
__device__ inline void check_rows(const AttentionInputs& in, int64_t b, int64_t n) {
  if (n == 0) {
    check_ranges(in, b);
    if (in.hr_from) first_hr_query(in, b);
  }
  for (int64_t r = n; in.hr_rows && r < in.rows; r += in.queries) query_at(in, b, r);
}

// How the queries weigh their keys, without alpha. kLanes lanes per query, a vector of 8 channels each.
constexpr int kStateThreads = 128;
template <typename T, int kLanes>
__global__ void grad_row_states(AttentionBackwardParams p) {
  const AttentionInputs& in = p.in;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x) / kLanes;
  const int64_t queries = in.batch * in.queries * in.heads, query = min(item, queries - 1);  // over [B, N, H]
  const int64_t head = query % in.heads, n = query / in.heads % in.queries, b = query / in.heads / in.queries;
  const int channel = 8 * (lane() % kLanes);
  float d = 0.f;
  if (channel < in.head_dim) {
    const auto out = load<8>(static_cast<const T*>(p.out) + query * in.head_dim + channel);
    const auto grad = load<8>(row_of<T>(p.grad_out, p.grad_out_strides, b, head, n) + channel);
#pragma unroll
    for (int i = 0; i < 8; ++i) d += widen(out.element[i]) * widen(grad.element[i]);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) d += __shfl_xor_sync(kAllLanes, d, step);
  if (channel != 0 || item != query) return;
  if (head == 0) check_rows(in, b, n);
  const int64_t at = state_index(in, b, head, n);
  const Weighing weighing{static_cast<float>(kLog2e) * static_cast<const float*>(p.lse)[at], d};
  states_of(p)[at] = {weighing, weighing};
}

template <typename T, int kLanes>
void launch_row_states(const char* name, const AttentionBackwardParams& p, Stream stream) {
  launch(name, grad_row_states<T, kLanes>, blocks_for(p.in.batch * p.in.queries * p.in.heads, kStateThreads / kLanes),
         kStateThreads, 0, stream, p);
}

// --------------------------------------------------------------------------------------------- a block of queries

// How the rows of a lane weigh their keys. Rows: as in row_steps.cuh.
template <typename Rows>
struct RowStates {
  const AttentionBackwardParams& p;
  const BlockWork& work;
  QueryState states[Rows::kLaneRows];

  // State of the lane's row `which`; of the last query for rows past it.
  __device__ int64_t index(int which) const {
    const int row = min(block_row<Rows>(which), work.rows - 1);
    return state_index(p.in, work.sample, work.head, work.first_row + row);
  }
  __device__ void read() {
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which) states[which] = states_of(p)[index(which)];
  }
  // Before `add_to_d`: the two softmaxes as they are, with d = 0.
  __device__ void begin() {
    constexpr float kBase2 = static_cast<float>(kLog2e);
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which) {
      const int64_t at = index(which);
      states[which] = {{kBase2 * static_cast<const float*>(p.lse_seq)[at], 0.f},
                       {kBase2 * static_cast<const float*>(p.lse)[at], 0.f}};
    }
  }
  // Add to d of both softmaxes. s, dp: scores and dP of a tile of keys.
  template <int n, typename Visible>
  __device__ __forceinline__ void add_to_d(bool hr, const Visible& visible, const float (&s)[n], const float (&dp)[n],
                                           float scale) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      QueryState& row = states[Rows::row_of(i)];
      if (!visible(i)) continue;
      row.hr.d += exp2_approx(scale * s[i] - row.hr.lse) * dp[i];
      if (!hr) row.sequence.d += exp2_approx(scale * s[i] - row.sequence.lse) * dp[i];
    }
  }
  __device__ void write() {
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which) {
      QueryState& state = states[which];
      for (Weighing* x : {&state.hr, &state.sequence})
        x->d = Rows::over_row(x->d, [](float x, float y) { return x + y; });
      if (Rows::first_of_row() && block_row<Rows>(which) < work.rows)
        states_of(p)[index(which)] = mix(state.hr, state.sequence, work.alpha);
    }
  }
};

// Where the gradient of the lane's row `which` is; null past the last query.
template <typename Rows>
__device__ __forceinline__ typename Rows::Element* gradient_of_row(const AttentionBackwardParams& p,
                                                                   const BlockWork& work, int which) {
  const int row = block_row<Rows>(which);
  if (row >= work.rows) return nullptr;
  return static_cast<typename Rows::Element*>(p.grad_q) +
         state_index(p.in, work.sample, work.head, work.first_row + row) * p.in.head_dim;
}

// ------------------------------------------------------------------------------------------------ a block of keys

// Queries from `first` on, in the list that a head of a sample has.
struct QueryTile {
  int sample, head, first;
};

// What a query sees; what `begin` and `end` mean is up to the keys.
struct alignas(8) Sight {
  int begin, end;
};

static_assert(kPassingRows == kWarp, "a warp describes the queries that pass by, one per lane");

// What is known of the queries of a tile. Arrays apart: lanes read entries 0, 2, 8 and 10 at once.
struct PassingQueries {
  Weighing weighing[kPassingRows];
  Sight sight[kPassingRows];
};
struct PassingQuery {
  Weighing weighing;
  Sight sight;
};

// What the blocks of a key head stream: queries of its heads, and gradients of their outputs.
inline int64_t bytes_of_queries(const AttentionInputs& in) {
  return 2 * in.queries * in.head_dim * bytes_of(in.dtype) * in.heads / in.kv_heads;
}

// The keys of a block are 16 kWarps of the sequence of a sample. Shared by the block, as registers are scarce.
template <typename T, int kWarps>
struct SequenceKeys {
  static constexpr int kKeys = kWarpRows * kWarps;
  int sample, kv_head, first_key;
  int first_query, end_of_queries;  // those that may see a key; the first is that of a tile
  int first_head, end_of_heads;
  int start_of_keys, position;  // the first key that may be seen; where query 0 stands

  static BlockOrder order(const AttentionInputs& in) {
    return order_for_cache(in.batch * in.kv_heads, blocks_for(in.keys, kKeys), bytes_of_queries(in), l2_bytes());
  }

  // The first keys are seen by most queries: their blocks start first.
  __device__ void start(const AttentionInputs& in, BlockPlace place) {
    const int heads = static_cast<int>(in.kv_heads), group = static_cast<int>(in.heads) / heads;
    kv_head = place.head % heads;
    sample = place.head / heads;
    first_key = place.tile * kKeys;
    start_of_keys = static_cast<int>(cuda::first_key(in, sample));
    position = static_cast<int>(first_position(in, sample));
    const QueryInterval queries = queries_of_keys(in, sample, first_key, first_key + kKeys - 1);
    first_query = queries.begin / kPassingRows * kPassingRows;
    end_of_queries = queries.end;
    first_head = kv_head * group;
    end_of_heads = first_head + group;
  }
  __device__ QueryTile first_tile() const { return {sample, first_head, first_query}; }

  __device__ TileRows<T> rows(const void* data, const Strides& strides, int64_t count) const {
    return {row_of<T>(data, strides, sample, kv_head, 0), row_bytes<T>(strides), nullptr, first_key,
            static_cast<int>(count) - 1};
  }
  __device__ TileRows<T> keys(const AttentionInputs& in) const { return rows(in.k, in.k_strides, in.keys); }
  __device__ TileRows<T> values(const AttentionInputs& in) const { return rows(in.v, in.v_strides, in.keys); }

  // Go on to the first tile from this one on; false if there is none.
  __device__ bool find(const AttentionBackwardParams& p, QueryTile& tile) const {
    if (tile.first < end_of_queries) return true;
    tile.first = first_query;
    return ++tile.head < end_of_heads && tile.first < end_of_queries;
  }
  __device__ TileRows<T> queries(const AttentionInputs& in, const QueryTile& tile, const void* data,
                                 const Strides& strides) const {
    return {row_of<T>(data, strides, tile.sample, tile.head, 0), row_bytes<T>(strides), nullptr, tile.first,
            static_cast<int>(in.queries) - 1};
  }
  // begin, end: the keys that the query sees.
  __device__ PassingQuery query(const AttentionBackwardParams& p, const QueryTile& tile) const {
    const AttentionInputs& in = p.in;
    const int n = tile.first + lane(), last = static_cast<int>(in.queries) - 1;
    const KeyInterval seen = keys_of_position(in, tile.sample, start_of_keys, position + n);
    return {states_of(p)[state_index(in, tile.sample, tile.head, min(n, last))].sequence,
            {seen.begin, n <= last ? seen.end : 0}};
  }

  // What a lane knows of the key in a row of the block: INT32_MAX if no query sees it.
  __device__ int key_of(const AttentionBackwardParams& p, const QueryTile&, int row) const {
    const int j = first_key + row;
    return j < p.in.keys && unmasked(p.in, sample, j) ? j : INT32_MAX;
  }
  static __device__ bool visible(const AttentionInputs&, const QueryTile&, int key, const Sight& query) {
    return (query.begin <= key) & (key < query.end);
  }

  __device__ T* gradient(const AttentionBackwardParams& p, void* data, int row) const {
    const int64_t j = first_key + row, d = p.in.head_dim;
    return j < p.in.keys ? static_cast<T*>(data) + ((sample * p.in.kv_heads + kv_head) * p.in.keys + j) * d : nullptr;
  }
  static __device__ void* grad_k(const AttentionBackwardParams& p) { return p.grad_k; }
  static __device__ void* grad_v(const AttentionBackwardParams& p) { return p.grad_v; }
};

// The keys of a block are 16 kWarps slots of the pool. Each sample that owns some of them brings the queries that see
// HR keys: those end_of_queries in hr_rows, or all from hr_from on.
template <typename T, int kWarps>
struct PoolKeys {
  static constexpr int kKeys = kWarpRows * kWarps;
  int kv_head, first_slot;
  int first_head, end_of_heads;
  int end_of_queries;  // entries of a sample's list of queries

  static BlockOrder order(const AttentionInputs& in) {
    return order_for_cache(in.kv_heads, blocks_for(in.pool, kKeys), bytes_of_queries(in), l2_bytes());
  }

  __device__ void start(const AttentionInputs& in, BlockPlace place) {
    const int group = static_cast<int>(in.heads / in.kv_heads);
    kv_head = place.head;
    first_slot = place.tile * kKeys;
    first_head = kv_head * group;
    end_of_heads = first_head + group;
    end_of_queries = static_cast<int>(in.hr_rows ? in.rows : in.hr_from ? in.queries : 0);
  }
  // `find` goes on from here to the first sample.
  __device__ QueryTile first_tile() const { return {-1, end_of_heads, end_of_queries}; }

  __device__ TileRows<T> rows(const void* data, const Strides& strides, int64_t count) const {
    return {row_of<T>(data, strides, 0, kv_head, 0), row_bytes<T>(strides), nullptr, first_slot,
            static_cast<int>(count) - 1};
  }
  __device__ TileRows<T> keys(const AttentionInputs& in) const { return rows(in.k_hr, in.k_hr_strides, in.pool); }
  __device__ TileRows<T> values(const AttentionInputs& in) const { return rows(in.v_hr, in.v_hr_strides, in.pool); }

  // The number of a slot in the sample's list of keys, or -1.
  __device__ int key_at(const AttentionBackwardParams& p, int sample, int row) const {
    const int64_t slot = first_slot + row;
    return slot < p.in.pool ? p.slot_to_key[sample * p.in.pool + slot] : -1;
  }
  // Whether the sample owns a slot of the block. Called by whole warps, which all find the same.
  __device__ bool owned(const AttentionBackwardParams& p, int sample) const {
    bool any = false;
    for (int row = lane(); row < kKeys; row += kWarp) any |= key_at(p, sample, row) >= 0;
    return votes(any);
  }
  static __device__ int first_query(const AttentionInputs& in, int sample) {
    return in.hr_from ? in.hr_from[sample] / kPassingRows * kPassingRows : 0;  // checked with the states
  }
  __device__ bool find(const AttentionBackwardParams& p, QueryTile& tile) const {
    if (tile.first < end_of_queries) return true;
    if (++tile.head < end_of_heads) {
      tile.first = first_query(p.in, tile.sample);
      return true;
    }
    tile.head = first_head;
    while (++tile.sample < p.in.batch) {
      tile.first = first_query(p.in, tile.sample);
      if (tile.first < end_of_queries && owned(p, tile.sample)) return true;
    }
    return false;
  }
  __device__ TileRows<T> queries(const AttentionInputs& in, const QueryTile& tile, const void* data,
                                 const Strides& strides) const {
    return {row_of<T>(data, strides, tile.sample, tile.head, 0), row_bytes<T>(strides),
            in.hr_rows ? in.hr_rows + tile.sample * in.rows : nullptr, tile.first, end_of_queries - 1};
  }
  // begin: the query's row of hr_row_bits; end: 0 if it sees no HR key.
  __device__ PassingQuery query(const AttentionBackwardParams& p, const QueryTile& tile) const {
    const AttentionInputs& in = p.in;
    const int r = min(tile.first + lane(), end_of_queries - 1);
    const int n = in.hr_rows ? in.hr_rows[tile.sample * in.rows + r] : r;  // checked with the states
    const bool sees = tile.first + lane() < end_of_queries && n >= 0 && (in.hr_rows || n >= in.hr_from[tile.sample]);
    return {states_of(p)[state_index(in, tile.sample, tile.head, max(n, 0))].hr, {r, sees}};
  }

  // What a lane knows of the key in a row of the block: -1 if the sample does not own the slot.
  __device__ int key_of(const AttentionBackwardParams& p, const QueryTile& tile, int row) const {
    return key_at(p, tile.sample, row);
  }
  static __device__ bool visible(const AttentionInputs& in, const QueryTile& tile, int key, const Sight& query) {
    const bool sees = (key >= 0) & query.end;
    if (!in.hr_row_bits) return sees;
    return sees & bit(row_bits(in, tile.sample, query.begin), max(key, 0));
  }

  __device__ T* gradient(const AttentionBackwardParams& p, void* data, int row) const {
    const int64_t at = first_slot + row, d = p.in.head_dim;
    return at < p.in.pool ? static_cast<T*>(data) + (at * p.in.kv_heads + kv_head) * d : nullptr;
  }
  static __device__ void* grad_k(const AttentionBackwardParams& p) { return p.grad_k_hr; }
  static __device__ void* grad_v(const AttentionBackwardParams& p) { return p.grad_v_hr; }
};

}  // namespace flexattn::cuda
