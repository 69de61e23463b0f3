// Gradients of N x (N+M) attention on tensor cores (float16, bfloat16; head sizes up to 128). Scores are computed
// again from the log-sum-exps. A block owns rows of one side, 16 per warp, and 32 rows of the other side pass by:
//
//   grad_row_states     finds D = dO . O of every query
//   grad_row_tiles      owns 64 queries of a head; keys pass by, first those of the sequence, then the HR keys
//
//     P = exp(Q K^T - lse)      dS = P (dO V^T - D)          dQ += dS K
//
//   grad_key_tiles      owns keys, of the sequence or of the pool; the queries that see them pass by, head by head
//
//     P^T = exp(K Q^T - lse)    dV += P^T dO    dS^T = P^T (V dO^T - D)    dK += dS^T Q
//
// P, dS and their transposes never leave their lanes. No atomics; every sum in one order.
//
// With alpha, the weight of a sequence key is (1 - alpha) P_seq + alpha P_full, and each softmax has its own D (see
// attention_backward_generic.cu). In one row, P_full is a constant times P_seq, so the two together are one exponential
// with a log-sum-exp and a D of its own. grad_row_tiles<..., true> finds it in a pass over the keys instead of
// grad_row_states; nothing after it knows of alpha.
#pragma once

#include "attention_prefill.cuh"
#include "vector.cuh"

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
template <typename WeighingOf, typename Visible>
__device__ __forceinline__ void weigh(float (&s)[kPassingScores], float scale, const WeighingOf& weighing,
                                      const Visible& visible) {
#pragma unroll
  for (int i = 0; i < kPassingScores; ++i) {
    const float weight = exp2_approx(scale * s[i] - weighing(i).lse);
    s[i] = visible(i) ? weight : 0.f;
  }
}

// Replace dP by the gradients of the logits. A hidden key may be NaN: its weight decides.
template <typename WeighingOf>
__device__ __forceinline__ void differentiate(float (&dp)[kPassingScores], const float (&weights)[kPassingScores],
                                              const WeighingOf& weighing) {
#pragma unroll
  for (int i = 0; i < kPassingScores; ++i) dp[i] = weights[i] == 0.f ? 0.f : weights[i] * (dp[i] - weighing(i).d);
}

// Write factor * sum to the lane's two rows, to(which); null for one that does not exist.
template <typename Mma, typename To>
__device__ __forceinline__ void store_rows(const float (&sum)[Mma::kOutputs], float factor, int d, const To& to) {
  using T = typename Mma::Element;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    T* row = to(which);
    if (!row) continue;
#pragma unroll
    for (int i = 0; i < Mma::kOutputs; i += Mma::kNeighbours) {
      const int channel = Mma::channel_of_output(i) + Mma::channel_of_lane();
      if (Mma::row_of(i) == which && channel < d) store_scaled<Mma::kNeighbours>(row + channel, factor, sum + i);
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

// How the queries weigh their keys, without alpha. kLanesOfState lanes per query, a vector of 8 channels each.
constexpr int kLanesOfState = 16, kStateThreads = 128;
template <typename T>
__global__ void grad_row_states(AttentionBackwardParams p) {
  const AttentionInputs& in = p.in;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x) / kLanesOfState;
  const int64_t queries = in.batch * in.queries * in.heads, query = min(item, queries - 1);  // over [B, N, H]
  const int64_t head = query % in.heads, n = query / in.heads % in.queries, b = query / in.heads / in.queries;
  const int channel = 8 * (lane() % kLanesOfState);
  float d = 0.f;
  if (channel < in.head_dim) {
    const auto out = load<8>(static_cast<const T*>(p.out) + query * in.head_dim + channel);
    const auto grad = load<8>(row_of<T>(p.grad_out, p.grad_out_strides, b, head, n) + channel);
#pragma unroll
    for (int i = 0; i < 8; ++i) d += widen(out.element[i]) * widen(grad.element[i]);
  }
#pragma unroll
  for (int step = kLanesOfState / 2; step > 0; step /= 2) d += __shfl_xor_sync(kAllLanes, d, step);
  if (channel != 0 || item != query) return;
  if (head == 0) check_rows(in, b, n);
  const int64_t at = state_index(in, b, head, n);
  const Weighing weighing{static_cast<float>(kLog2e) * static_cast<const float*>(p.lse)[at], d};
  states_of(p)[at] = {weighing, weighing};
}

// --------------------------------------------------------------------------------------------- a block of queries

// Shared memory: grad_out, passing keys and values, work.
template <typename Mma>
constexpr size_t kRowTileElements = 8 * kTileRows * Mma::kRowChunks + 2 * kPassingBuffers<Mma> * kPassingElements<Mma>;
template <typename Mma>
size_t row_shared_bytes(int64_t selected) {
  return kRowTileElements<Mma> * sizeof(typename Mma::Element) + work_bytes(selected);
}

// The keys that pass by, half a tile at a time.
struct PassingKeys {
  const AttentionInputs& in;
  const BlockWork& work;
  int half = 0;  // number of the half tile

  __device__ bool exists() const { return half / 2 < work.tiles; }
  __device__ KeyTile tile() const {
    KeyTile tile = work.tile(half / 2);
    tile.first += half % 2 * kPassingRows;
    return tile;
  }
  // Go on to the first half from this one on that has keys which some row sees.
  __device__ void find() {
    for (; exists(); ++half) {
      const int whole = work.seen_tile_from(in, half / 2);
      if (whole != half / 2) half = 2 * whole;
      if (exists() && tile().first < tile().end) return;
    }
  }
};

template <typename Mma, int kD>
struct RowTile {
  using T = typename Mma::Element;
  const AttentionBackwardParams& p;
  T* grads;
  BlockWork& work;
  Mma mma;
  QueryState states[2];

  // What the lane's rows see of a half tile, as bits from its own first key on.
  struct Visible {
    uint32_t keys[2];
    __device__ bool operator()(int i) const { return keys[Mma::row_of(i)] >> Mma::key_of_score(i) & 1; }
  };
  __device__ Visible visible(const KeyTile& tile, bool masked) const {
    Visible bits{{~0u, ~0u}};
    if (!masked) return bits;
#pragma unroll
    for (int which = 0; which < 2; ++which)
      bits.keys[which] = work.visible_keys<uint32_t>(p.in, tile, block_row<Mma>(which)) >> Mma::key_of_lane();
    return bits;
  }

  __device__ void multiply_keys(float (&s)[kPassingScores], const T* keys) const { multiply_all_keys(mma, s, keys); }
  __device__ void multiply_values(float (&dp)[kPassingScores], const T* values) const {
    Mma::multiply_rows(dp, rows_of_warp<Mma>(grads), values);
  }

  // State of the lane's row `which`; of the last query for rows past it.
  __device__ int64_t state_of(int which) const {
    const int row = min(block_row<Mma>(which), work.rows - 1);
    return state_index(p.in, work.sample, work.head, work.first_row + row);
  }
  __device__ void read_states() {
#pragma unroll
    for (int which = 0; which < 2; ++which) states[which] = states_of(p)[state_of(which)];
  }
  // Before `add_to_d`: the two softmaxes as they are, with d = 0.
  __device__ void begin_states() {
    constexpr float kBase2 = static_cast<float>(kLog2e);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int64_t at = state_of(which);
      states[which] = {{kBase2 * static_cast<const float*>(p.lse_seq)[at], 0.f},
                       {kBase2 * static_cast<const float*>(p.lse)[at], 0.f}};
    }
  }
  __device__ void write_states() {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      QueryState& state = states[which];
      for (Weighing* x : {&state.hr, &state.sequence})
        x->d = Mma::over_row(x->d, [](float x, float y) { return x + y; });
      if (Mma::first_of_row() && block_row<Mma>(which) < work.rows)
        states_of(p)[state_of(which)] = mix(state.hr, state.sequence, work.alpha);
    }
  }

  // s, dp: scores and dP, which become weights and dS.
  __device__ void weigh_keys(const KeyTile& tile, bool masked, float (&s)[kPassingScores], float (&dp)[kPassingScores],
                             float scale) const {
    const Weighing of_rows[2] = {tile.hr ? states[0].hr : states[0].sequence,
                                 tile.hr ? states[1].hr : states[1].sequence};
    const auto weighing = [&](int i) -> const Weighing& { return of_rows[Mma::row_of(i)]; };
    weigh(s, scale, weighing, visible(tile, masked));
    differentiate(dp, s, weighing);
  }

  // Add to d of both softmaxes; states: those of the whole and of the sequence, not mixed.
  __device__ void add_to_d(const KeyTile& tile, bool masked, const float (&s)[kPassingScores],
                           const float (&dp)[kPassingScores], float scale) {
    const Visible seen = visible(tile, masked);
#pragma unroll
    for (int i = 0; i < kPassingScores; ++i) {
      QueryState& row = states[Mma::row_of(i)];
      if (!seen(i)) continue;
      row.hr.d += exp2_approx(scale * s[i] - row.hr.lse) * dp[i];
      if (!tile.hr) row.sequence.d += exp2_approx(scale * s[i] - row.sequence.lse) * dp[i];
    }
  }
};

// kStates: find out how the queries weigh their keys; otherwise, their gradients.
template <typename Mma, int kD, bool kStates>
__global__ void __launch_bounds__(kTileThreads, 2) grad_row_tiles(AttentionBackwardParams p, BlockOrder order) {
  using T = typename Mma::Element;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T* shared = shared_memory<T>();
  BlockWork& work = *reinterpret_cast<BlockWork*>(shared + kRowTileElements<Mma>);
  clear_rows<Mma, kD>(shared, kTileRows + 2 * kPassingBuffers<Mma> * kPassingRows, d);
  describe_work(in, order, work);

  RowTile<Mma, kD> tile{p, shared, work};
  load_query(tile.mma, in, work);
  load_own_rows<Mma, kD, kTileRows, kTileThreads>(
      TileRows<T>{row_of<T>(p.grad_out, p.grad_out_strides, work.sample, work.head, 0),
                  row_bytes<T>(p.grad_out_strides), nullptr, work.first_row, static_cast<int>(in.queries) - 1},
      d, tile.grads);
  if constexpr (kStates)
    tile.begin_states();
  else
    tile.read_states();
  PassingRows<Mma, kD, kTileThreads> passing;
  passing.buffers = shared + 8 * kTileRows * Mma::kRowChunks;
  const auto issue = [&](const KeyTile& keys) {
    passing.issue_same(key_rows<T>(work, keys), value_rows<T>(work, keys), d);
  };

  float grad_q[Mma::kOutputs] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);
  PassingKeys keys{in, work};
  keys.find();
  if (keys.exists()) {
    issue(keys.tile());
    passing.commit(d);
  }
  __syncthreads();

  while (keys.exists()) {
    const KeyTile current = keys.tile();
    const bool masked = !work.sees_all(in, current);
    if (!kStates && masked && clear_unseen_rows<Mma, kPassingRows>(in, work, current, passing.rows(0))) __syncthreads();
    ++keys.half;
    keys.find();
    if (keys.exists()) issue(keys.tile());
    float s[kPassingScores] = {}, dp[kPassingScores] = {};
    tile.multiply_keys(s, passing.rows(0));
    tile.multiply_values(dp, passing.rows(1));
    if constexpr (kStates) {
      tile.add_to_d(current, masked, s, dp, scale);
    } else {
      tile.weigh_keys(current, masked, s, dp, scale);
      Mma::multiply_weights(grad_q, dp, passing.rows(0));
    }
    if (keys.exists()) passing.commit(d);
    __syncthreads();
  }

  if constexpr (kStates) {
    tile.write_states();
  } else {
    store_rows<Mma>(grad_q, static_cast<float>(in.scale), d, [&](int which) {
      return block_row<Mma>(which) < work.rows ? static_cast<T*>(p.grad_q) + tile.state_of(which) * d : nullptr;
    });
  }
}

// ------------------------------------------------------------------------------------------------ a block of keys

// Queries first .. first + 31 of the list that a head of a sample has.
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

  // What a lane knows of its two keys.
  struct Lane {
    int key[2];  // INT32_MAX if no query sees it
  };
  __device__ Lane lane_of(const AttentionBackwardParams& p, const QueryTile&, const int (&rows)[2]) const {
    Lane lane;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int j = first_key + rows[which];
      lane.key[which] = j < p.in.keys && unmasked(p.in, sample, j) ? j : INT32_MAX;
    }
    return lane;
  }
  static __device__ bool visible(const AttentionInputs&, const QueryTile&, const Lane& lane, int which,
                                 const Sight& query) {
    return (query.begin <= lane.key[which]) & (lane.key[which] < query.end);
  }

  __device__ T* gradient(const AttentionBackwardParams& p, void* data, int row) const {
    const int64_t j = first_key + row, d = p.in.head_dim;
    return j < p.in.keys ? static_cast<T*>(data) + ((sample * p.in.kv_heads + kv_head) * p.in.keys + j) * d : nullptr;
  }
  static __device__ void* grad_k(const AttentionBackwardParams& p) { return p.grad_k; }
  static __device__ void* grad_v(const AttentionBackwardParams& p) { return p.grad_v; }
};

// The keys of a block are 16 kWarps slots of the pool. Each sample that owns some of them brings the queries that see
// HR keys: those listed in hr_rows, or all from hr_from on.
template <typename T, int kWarps>
struct PoolKeys {
  static constexpr int kKeys = kWarpRows * kWarps;
  int kv_head, first_slot;
  int first_head, end_of_heads;
  int listed;  // entries of a sample's list of queries

  static BlockOrder order(const AttentionInputs& in) {
    return order_for_cache(in.kv_heads, blocks_for(in.pool, kKeys), bytes_of_queries(in), l2_bytes());
  }

  __device__ void start(const AttentionInputs& in, BlockPlace place) {
    const int group = static_cast<int>(in.heads / in.kv_heads);
    kv_head = place.head;
    first_slot = place.tile * kKeys;
    first_head = kv_head * group;
    end_of_heads = first_head + group;
    listed = static_cast<int>(in.hr_rows ? in.rows : in.hr_from ? in.queries : 0);
  }
  // `find` goes on from here to the first sample.
  __device__ QueryTile first_tile() const { return {-1, end_of_heads, listed}; }

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
    if (tile.first < listed) return true;
    if (++tile.head < end_of_heads) {
      tile.first = first_query(p.in, tile.sample);
      return true;
    }
    tile.head = first_head;
    while (++tile.sample < p.in.batch) {
      tile.first = first_query(p.in, tile.sample);
      if (tile.first < listed && owned(p, tile.sample)) return true;
    }
    return false;
  }
  __device__ TileRows<T> queries(const AttentionInputs& in, const QueryTile& tile, const void* data,
                                 const Strides& strides) const {
    return {row_of<T>(data, strides, tile.sample, tile.head, 0), row_bytes<T>(strides),
            in.hr_rows ? in.hr_rows + tile.sample * in.rows : nullptr, tile.first, listed - 1};
  }
  // begin: the query's row of hr_row_bits; end: 0 if it sees no HR key.
  __device__ PassingQuery query(const AttentionBackwardParams& p, const QueryTile& tile) const {
    const AttentionInputs& in = p.in;
    const int r = min(tile.first + lane(), listed - 1);
    const int n = in.hr_rows ? in.hr_rows[tile.sample * in.rows + r] : r;  // checked with the states
    const bool sees = tile.first + lane() < listed && n >= 0 && (in.hr_rows || n >= in.hr_from[tile.sample]);
    return {states_of(p)[state_index(in, tile.sample, tile.head, max(n, 0))].hr, {r, sees}};
  }

  // What a lane knows of its two keys.
  struct Lane {
    int key[2];  // -1 if the sample does not own the slot
  };
  __device__ Lane lane_of(const AttentionBackwardParams& p, const QueryTile& tile, const int (&rows)[2]) const {
    return {{key_at(p, tile.sample, rows[0]), key_at(p, tile.sample, rows[1])}};
  }
  static __device__ bool visible(const AttentionInputs& in, const QueryTile& tile, const Lane& lane, int which,
                                 const Sight& query) {
    const bool sees = (lane.key[which] >= 0) & query.end;
    if (!in.hr_row_bits) return sees;
    return sees & bit(row_bits(in, tile.sample, query.begin), max(lane.key[which], 0));
  }

  __device__ T* gradient(const AttentionBackwardParams& p, void* data, int row) const {
    const int64_t at = first_slot + row, d = p.in.head_dim;
    return at < p.in.pool ? static_cast<T*>(data) + (at * p.in.kv_heads + kv_head) * d : nullptr;
  }
  static __device__ void* grad_k(const AttentionBackwardParams& p) { return p.grad_k_hr; }
  static __device__ void* grad_v(const AttentionBackwardParams& p) { return p.grad_v_hr; }
};

// Shared memory: keys, values, passing queries and grad_out; what is known of those queries; Keys.
template <int kWarps>
constexpr int kKeyThreads = kWarp * kWarps;
template <typename Mma, int kWarps>
constexpr size_t kKeyTileElements =
    2 * 8 * kWarpRows * kWarps * Mma::kRowChunks + 2 * kPassingBuffers<Mma> * kPassingElements<Mma>;
template <typename Mma, typename Keys, int kWarps>
constexpr size_t key_shared_bytes() {
  return kKeyTileElements<Mma, kWarps> * sizeof(typename Mma::Element) + kPassingBuffers<Mma> * sizeof(PassingQueries) +
         sizeof(Keys);
}

template <typename Mma, int kD, int kWarps, template <typename, int> class KeysOf>
__global__ void __launch_bounds__(kKeyThreads<kWarps>, 1) grad_key_tiles(AttentionBackwardParams p, BlockOrder order) {
  using T = typename Mma::Element;
  using Keys = KeysOf<T, kWarps>;
  constexpr int kThreads = kKeyThreads<kWarps>, kOwn = 8 * Keys::kKeys * Mma::kRowChunks;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T *own_keys = shared_memory<T>(), *own_values = own_keys + kOwn;
  PassingQueries* known = reinterpret_cast<PassingQueries*>(own_keys + kKeyTileElements<Mma, kWarps>);
  Keys& keys = *reinterpret_cast<Keys*>(known + kPassingBuffers<Mma>);
  clear_rows<Mma, kD>(own_keys, 2 * (Keys::kKeys + kPassingBuffers<Mma> * kPassingRows), d);
  if (threadIdx.x == 0) keys.start(in, order.place(static_cast<int>(blockIdx.x)));
  __syncthreads();
  QueryTile tile = keys.first_tile();
  load_own_rows<Mma, kD, Keys::kKeys, kThreads>(keys.keys(in), d, own_keys);
  load_own_rows<Mma, kD, Keys::kKeys, kThreads>(keys.values(in), d, own_values);

  PassingRows<Mma, kD, kThreads> passing;
  passing.buffers = own_values + kOwn;
  const auto issue = [&] {
    passing.issue_same(keys.queries(in, tile, in.q, in.q_strides),
                       keys.queries(in, tile, p.grad_out, p.grad_out_strides), d);
  };
  const auto commit = [&] {
    passing.commit(d);
    if (warp_in_block() != 0) return;
    const PassingQuery query = keys.query(p, tile);
    known[passing.current].weighing[lane()] = query.weighing;
    known[passing.current].sight[lane()] = query.sight;
  };

  float grad_k[Mma::kOutputs] = {}, grad_v[Mma::kOutputs] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);
  const int rows[2] = {block_row<Mma>(0), block_row<Mma>(1)};
  bool more = keys.find(p, tile);
  if (more) {
    issue();
    commit();
  }
  __syncthreads();

  while (more) {
    const Weighing* weighings = known[passing.current].weighing + Mma::key_of_lane();
    const Sight* sights = known[passing.current].sight + Mma::key_of_lane();
    const auto weighing = [&](int i) -> const Weighing& { return weighings[Mma::key_of_score(i)]; };
    const QueryTile current = tile;
    const typename Keys::Lane lane = keys.lane_of(p, tile, rows);
    tile.first += kPassingRows;
    more = keys.find(p, tile);
    if (more) issue();

    float s[kPassingScores] = {}, dp[kPassingScores] = {};
    Mma::multiply_rows(s, rows_of_warp<Mma>(own_keys), passing.rows(0));
    weigh(s, scale, weighing,
          [&](int i) { return Keys::visible(in, current, lane, Mma::row_of(i), sights[Mma::key_of_score(i)]); });
    Mma::multiply_weights(grad_v, s, passing.rows(1));
    Mma::multiply_rows(dp, rows_of_warp<Mma>(own_values), passing.rows(1));
    differentiate(dp, s, weighing);
    Mma::multiply_weights(grad_k, dp, passing.rows(0));
    if (more) commit();
    __syncthreads();
  }
  const auto row_of_gradient = [&](void* data) {
    return [&, data](int which) { return keys.gradient(p, data, rows[which]); };
  };
  store_rows<Mma>(grad_k, static_cast<float>(in.scale), d, row_of_gradient(Keys::grad_k(p)));
  store_rows<Mma>(grad_v, 1.f, d, row_of_gradient(Keys::grad_v(p)));
}

}  // namespace flexattn::cuda
