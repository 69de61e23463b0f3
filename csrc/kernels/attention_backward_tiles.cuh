// Gradients of N x (N+M) attention on tensor cores (float16, bfloat16; head sizes up to 128). Scores are computed
// again from the log-sum-exps. A block owns rows of one side, 16 per warp, and 32 rows of the other side pass by:
//
//   grad_row_tiles      owns 64 queries of a head; keys pass by, first those of the sequence, then the HR keys
//
//     S = Q K^T      dP = dO V^T      dS = P (dP - D)      dQ += dS K
//
//   grad_key_tiles      owns keys, of the sequence or of the pool; the queries that see them pass by, head by head
//
//     S^T = K Q^T    dP^T = V dO^T    dS^T as above        dV += P^T dO    dK += dS^T Q
//
// P, dS and their transposes never leave their lanes. The notation is that of attention_backward_generic.cu: where
// alpha mixes two softmaxes, P is their mixture, and each has its own D. No atomics; every sum in one order.
#pragma once

#include "attention_prefill.cuh"

namespace flexattn::cuda {

constexpr int kPassingRows = 32;
constexpr int kPassingScores = kPassingRows / 2;  // of a lane
static_assert(kPassingRows == kWarp, "a warp describes the rows that pass by, one per lane");

// What the probabilities of a query are made of: log-sum-exps in base 2, and D = sum over keys of P dP, for the softmax
// over all its keys and for the one over the sequence.
struct alignas(16) QueryState {
  float lse, d, lse_seq, d_seq;
};

// Gradients of a pair of query and key: of the value per output, and of the logit.
struct PairGradient {
  float weight, logit;
};

// logit: in base 2.
template <bool kHr, bool kMixed>
__device__ __forceinline__ PairGradient pair_gradient(const QueryState& query, float logit, float dp, float alpha) {
  const float all = kMixed ? alpha * exp2_approx(logit - query.lse) : exp2_approx(logit - query.lse);
  if constexpr (kHr || !kMixed) return {all, all * (dp - query.d)};
  const float sequence = (1.f - alpha) * exp2_approx(logit - query.lse_seq);
  return {all + sequence, all * (dp - query.d) + sequence * (dp - query.d_seq)};
}

// Replace scores by the pair's weight, and dp by the gradient of its logit. state(i), visible(i): of the pair of score
// i.
template <bool kHr, bool kMixed, typename State, typename Visible>
__device__ __forceinline__ void weigh_pairs(float (&s)[kPassingScores], float (&dp)[kPassingScores], float scale,
                                            float alpha, const State& state, const Visible& visible) {
#pragma unroll
  for (int i = 0; i < kPassingScores; ++i) {
    const PairGradient pair = pair_gradient<kHr, kMixed>(state(i), scale * s[i], dp[i], alpha);
    const bool seen = visible(i);
    s[i] = seen ? pair.weight : 0.f;
    dp[i] = seen ? pair.logit : 0.f;
  }
}

// Rows on their way through a buffer, or through one of two if cp.async fills it while the other is read.
template <typename Mma>
constexpr int kPassingBuffers = Mma::kAsync ? 2 : 1;
template <typename Mma>
constexpr int kPassingElements = 8 * kPassingRows * Mma::kRowChunks;

template <typename Mma, int kD, int kThreads>
struct PassingRows {
  using T = typename Mma::Element;
  using Layout = KeyLayout<Mma>;
  TileCopy<Mma, kD, kPassingRows, kThreads, 1> copies[2];
  T* buffers;  // of both tensors, kPassingBuffers times
  int current = 0;

  __device__ T* rows(int tensor, int ahead = 0) const {
    const int buffer = (current + ahead) % kPassingBuffers<Mma>;
    return buffers + (2 * buffer + tensor) * kPassingElements<Mma>;
  }
  // Start loading the next rows of both tensors.
  __device__ void issue(const TileRows<T>& first, const TileRows<T>& second, int d) {
    copies[0].template issue<Layout, 0>(first, d, rows(0, 1));
    copies[1].template issue<Layout, 0>(second, d, rows(1, 1));
  }
  // Make them the current rows. The whole block; a barrier must follow.
  __device__ void commit() {
    if (!Mma::kAsync) __syncthreads();  // the current rows are no longer read
    copies[0].template commit<Layout, 0>(rows(0, 1));
    copies[1].template commit<Layout, 0>(rows(1, 1));
    current = (current + 1) % kPassingBuffers<Mma>;
  }
};

// Load the rows that a block owns.
template <typename Mma, int kD, int kRows, int kThreads, typename T>
__device__ void load_own_rows(const TileRows<T>& rows, int d, T* shared) {
  constexpr int kParts = 4;
  TileCopy<Mma, kD, kRows, kThreads, kParts> copy;
  copy.template issue<KeyLayout<Mma>, 0>(rows, d, shared);
  unrolled<kParts>([&](auto part) { copy.template advance<KeyLayout<Mma>, part.value>(rows, d, shared); });
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
    for (int i = 0; i < Mma::kOutputs; i += 2) {  // two neighbouring channels
      const int channel = Mma::channel_of_output(i) + Mma::channel_of_lane();
      if (Mma::row_of(i) != which || channel >= d) continue;
      alignas(4) const T both[2] = {narrow<T>(factor * sum[i]), narrow<T>(factor * sum[i + 1])};
      *reinterpret_cast<uint32_t*>(row + channel) = *reinterpret_cast<const uint32_t*>(both);
    }
  }
}

__device__ inline int64_t state_index(const AttentionInputs& in, int64_t b, int64_t head, int64_t n) {
  return (b * in.heads + head) * in.queries + n;
}
__device__ inline QueryState* states_of(const AttentionBackwardParams& p) { return static_cast<QueryState*>(p.delta); }

// --------------------------------------------------------------------------------------------- a block of queries

// Shared memory: grad_out, passing keys and values, work.
template <typename Mma>
constexpr size_t row_tile_elements() {
  return 8 * kTileRows * Mma::kRowChunks + 2 * kPassingBuffers<Mma> * kPassingElements<Mma>;
}
template <typename Mma>
size_t row_shared_bytes(int64_t selected) {
  return row_tile_elements<Mma>() * sizeof(typename Mma::Element) + work_bytes(selected);
}

// Half a tile of keys.
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
  __device__ Visible visible(const KeyTile& tile) const {
    Visible bits{{~0u, ~0u}};
    if (work.sees_all(p.in, tile)) return bits;
#pragma unroll
    for (int which = 0; which < 2; ++which)
      bits.keys[which] =
          static_cast<uint32_t>(work.visible_keys(p.in, tile, block_row<Mma>(which))) >> Mma::key_of_lane();
    return bits;
  }

  __device__ void multiply(float (&s)[kPassingScores], float (&dp)[kPassingScores], const T* keys,
                           const T* values) const {
    unrolled<Mma::kParts>([&](auto part) { mma.template multiply_keys<part.value>(s, keys); });
    Mma::multiply_rows(dp, grads + 8 * kWarpRows * warp_in_block() * Mma::kRowChunks, values);
  }

  __device__ void weigh(const KeyTile& tile, float (&s)[kPassingScores], float (&dp)[kPassingScores],
                        float scale) const {
    const Visible seen = visible(tile);
    const auto state = [&](int i) -> const QueryState& { return states[Mma::row_of(i)]; };
    if (work.alpha == 1.f)
      weigh_pairs<false, false>(s, dp, scale, 1.f, state, seen);
    else if (tile.hr)
      weigh_pairs<true, true>(s, dp, scale, work.alpha, state, seen);
    else
      weigh_pairs<false, true>(s, dp, scale, work.alpha, state, seen);
  }

  // D of both softmaxes, from the weights of their keys.
  __device__ void add_to_d(const KeyTile& tile, const float (&s)[kPassingScores], const float (&dp)[kPassingScores],
                           float scale) {
    const Visible seen = visible(tile);
#pragma unroll
    for (int i = 0; i < kPassingScores; ++i) {
      QueryState& row = states[Mma::row_of(i)];
      if (!seen(i)) continue;
      row.d += exp2_approx(scale * s[i] - row.lse) * dp[i];
      if (!tile.hr) row.d_seq += exp2_approx(scale * s[i] - row.lse_seq) * dp[i];
    }
  }
};

// Fill in the states of queries whose D needs both softmaxes, or their gradients. kStates: which of them.
template <typename Mma, int kD, bool kStates>
__global__ void __launch_bounds__(kTileThreads, 2) grad_row_tiles(AttentionBackwardParams p) {
  using T = typename Mma::Element;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T* shared = shared_memory<T>();
  BlockWork& work = *reinterpret_cast<BlockWork*>(shared + row_tile_elements<Mma>());
  describe_work(in, work);

  RowTile<Mma, kD> tile{p, shared, work};
  load_query(tile.mma, in, work);
  load_own_rows<Mma, kD, kTileRows, kTileThreads>(
      TileRows<T>{row_of<T>(p.grad_out, p.grad_out_strides, work.sample, work.head, 0), p.grad_out_strides.row, nullptr,
                  work.first_row, static_cast<int>(in.queries) - 1},
      d, tile.grads);
  const int64_t first_state = state_index(in, work.sample, work.head, work.first_row);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int64_t at = first_state + min(block_row<Mma>(which), work.rows - 1);
    tile.states[which] = kStates
                             ? QueryState{static_cast<const float*>(p.lse)[at] * static_cast<float>(kLog2e), 0.f,
                                          static_cast<const float*>(p.lse_seq)[at] * static_cast<float>(kLog2e), 0.f}
                             : states_of(p)[at];
  }
  PassingRows<Mma, kD, kTileThreads> passing;
  passing.buffers = shared + 8 * kTileRows * Mma::kRowChunks;
  const auto issue = [&](const KeyTile& keys) {
    passing.issue(key_rows<T>(in, keys, work.sample, work.kv_head), value_rows<T>(in, keys, work.sample, work.kv_head),
                  d);
  };

  float grad_q[Mma::kOutputs] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);
  PassingKeys keys{in, work};
  keys.find();
  if (keys.exists()) {
    issue(keys.tile());
    passing.commit();
  }
  __syncthreads();

  while (keys.exists()) {
    const KeyTile current = keys.tile();
    ++keys.half;
    keys.find();
    if (keys.exists()) issue(keys.tile());
    float s[kPassingScores] = {}, dp[kPassingScores] = {};
    tile.multiply(s, dp, passing.rows(0), passing.rows(1));
    if constexpr (kStates) {
      tile.add_to_d(current, s, dp, scale);
    } else {
      tile.weigh(current, s, dp, scale);
      Mma::multiply_weights(grad_q, dp, passing.rows(0));
    }
    if (keys.exists()) passing.commit();
    __syncthreads();
  }

  if constexpr (kStates) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      QueryState& state = tile.states[which];
      state.d = Mma::over_row(state.d, [](float x, float y) { return x + y; });
      state.d_seq = Mma::over_row(state.d_seq, [](float x, float y) { return x + y; });
      if (Mma::first_of_row() && block_row<Mma>(which) < work.rows)
        states_of(p)[first_state + block_row<Mma>(which)] = state;
    }
  } else {
    store_rows<Mma>(grad_q, static_cast<float>(in.scale), d, [&](int which) {
      const int row = block_row<Mma>(which);
      return row < work.rows ? static_cast<T*>(p.grad_q) + (first_state + row) * d : nullptr;
    });
  }
}

// ------------------------------------------------------------------------------------------------ a block of keys

// 32 queries that pass by: of a sample and a head, first .. first + 31 of what Keys lists.
struct QueryTile {
  int sample, head, first;
};

// What lane l of a warp knows of query l of a tile.
struct PassingQuery {
  QueryState state;
  int2 sees;  // as Keys::visible reads it
};

// The keys of a block are 16 kWarps of the sequence of a sample.
template <typename T, int kWarps>
struct SequenceKeys {
  static constexpr bool kHr = false;
  static constexpr int kKeys = kWarpRows * kWarps;
  const AttentionBackwardParams& p;
  int sample, kv_head, begin;
  int first_query;    // of all that may see a key
  bool unmasked_[2];  // the lane's keys

  __device__ static int64_t blocks(const AttentionInputs& in) {
    return blocks_for(in.keys, kKeys) * in.kv_heads * in.batch;
  }

  // The first keys are seen by most queries: their blocks start first.
  __device__ SequenceKeys(const AttentionBackwardParams& p, int block, const int (&rows)[2]) : p(p) {
    const AttentionInputs& in = p.in;
    const int heads = static_cast<int>(in.kv_heads), samples = static_cast<int>(in.batch);
    kv_head = block % heads;
    sample = block / heads % samples;
    begin = block / heads / samples * kKeys;
    first_query = max(0, begin - static_cast<int>(first_position(in, sample))) / kPassingRows * kPassingRows;
    for (int which = 0; which < 2; ++which) {
      const int j = begin + rows[which];
      unmasked_[which] = j < in.keys && unmasked(in, sample, j);
    }
  }

  __device__ TileRows<T> rows(const void* data, const Strides& strides) const {
    return {row_of<T>(data, strides, sample, kv_head, 0), strides.row, nullptr, begin, static_cast<int>(p.in.keys) - 1};
  }
  __device__ TileRows<T> keys() const { return rows(p.in.k, p.in.k_strides); }
  __device__ TileRows<T> values() const { return rows(p.in.v, p.in.v_strides); }

  __device__ QueryTile first() const {
    return {sample, kv_head * static_cast<int>(p.in.heads / p.in.kv_heads), first_query};
  }
  // The first tile from this one on; false if there is none.
  __device__ bool find(QueryTile& tile) const {
    if (tile.first < p.in.queries) return true;
    tile.first = first_query;
    return ++tile.head < (kv_head + 1) * (p.in.heads / p.in.kv_heads) && tile.first < p.in.queries;
  }
  __device__ TileRows<T> queries(const QueryTile& tile, const void* data, const Strides& strides) const {
    return {row_of<T>(data, strides, tile.sample, tile.head, 0), strides.row, nullptr, tile.first,
            static_cast<int>(p.in.queries) - 1};
  }
  // sees: the first key that the query sees, and one past the last.
  __device__ PassingQuery query(const QueryTile& tile) const {
    const AttentionInputs& in = p.in;
    const int n = tile.first + lane(), last = static_cast<int>(in.queries) - 1;
    PassingQuery query{states_of(p)[state_index(in, tile.sample, tile.head, min(n, last))], {0, 0}};
    if (n <= last)
      query.sees = {static_cast<int>(first_key(in, tile.sample)), static_cast<int>(end_of_keys(in, tile.sample, n))};
    return query;
  }
  __device__ void enter(const QueryTile&, const int (&)[2]) {}
  __device__ bool visible(int which, int row, const int2& sees) const {
    const int j = begin + row;
    return unmasked_[which] && sees.x <= j && j < sees.y;
  }

  __device__ T* gradient(void* data, int row) const {
    const int64_t j = begin + row, d = p.in.head_dim;
    return j < p.in.keys ? static_cast<T*>(data) + ((sample * p.in.kv_heads + kv_head) * p.in.keys + j) * d : nullptr;
  }
  __device__ void* grad_k() const { return p.grad_k; }
  __device__ void* grad_v() const { return p.grad_v; }
};

// The keys of a block are 16 kWarps slots of the pool; each sample that owns some of them brings the queries that see
// HR keys: those listed in hr_rows, or all from hr_from on.
template <typename T, int kWarps>
struct PoolKeys {
  static constexpr bool kHr = true;
  static constexpr int kKeys = kWarpRows * kWarps;
  const AttentionBackwardParams& p;
  int kv_head, first_slot;
  int key[2];  // of the lane's slots: the number of the key in the sample's list, or -1

  __device__ static int64_t blocks(const AttentionInputs& in) { return blocks_for(in.pool, kKeys) * in.kv_heads; }

  __device__ PoolKeys(const AttentionBackwardParams& p, int block, const int (&)[2]) : p(p), key{-1, -1} {
    kv_head = block % static_cast<int>(p.in.kv_heads);
    first_slot = block / static_cast<int>(p.in.kv_heads) * kKeys;
  }

  __device__ TileRows<T> rows(const void* data, const Strides& strides) const {
    return {row_of<T>(data, strides, 0, kv_head, 0), strides.row, nullptr, first_slot, static_cast<int>(p.in.pool) - 1};
  }
  __device__ TileRows<T> keys() const { return rows(p.in.k_hr, p.in.k_hr_strides); }
  __device__ TileRows<T> values() const { return rows(p.in.v_hr, p.in.v_hr_strides); }

  // Entries of the list of queries, and the first that counts.
  __device__ int listed() const { return static_cast<int>(p.in.hr_rows ? p.in.rows : p.in.hr_from ? p.in.queries : 0); }
  __device__ int begin(int b) const { return p.in.hr_from ? p.in.hr_from[b] / kPassingRows * kPassingRows : 0; }
  __device__ int key_at(int b, int row) const {
    const int64_t slot = first_slot + row;
    return slot < p.in.pool ? p.slot_to_key[b * p.in.pool + slot] : -1;
  }
  // Whether the sample owns a slot of the block. All threads of a warp; every warp finds the same.
  __device__ bool owned(int b) const {
    bool any = false;
    for (int row = lane(); row < kKeys; row += kWarp) any |= key_at(b, row) >= 0;
    return votes(any);
  }

  __device__ QueryTile first() const { return {-1, 0, 0}; }
  __device__ bool find(QueryTile& tile) const {
    const int heads = static_cast<int>(p.in.heads / p.in.kv_heads);
    if (tile.sample >= 0 && tile.first < listed()) return true;
    if (tile.sample >= 0 && ++tile.head < (kv_head + 1) * heads) {
      tile.first = begin(tile.sample);
      return true;
    }
    tile.head = kv_head * heads;
    while (++tile.sample < p.in.batch) {
      tile.first = begin(tile.sample);
      if (tile.first < listed() && owned(tile.sample)) return true;
    }
    return false;
  }
  __device__ TileRows<T> queries(const QueryTile& tile, const void* data, const Strides& strides) const {
    return {row_of<T>(data, strides, tile.sample, tile.head, 0), strides.row,
            p.in.hr_rows ? p.in.hr_rows + tile.sample * p.in.rows : nullptr, tile.first, listed() - 1};
  }
  // sees.x: 0 if the query sees no HR key; sees.y: its row of hr_row_bits.
  __device__ PassingQuery query(const QueryTile& tile) const {
    const AttentionInputs& in = p.in;
    const int r = tile.first + lane(), last = listed() - 1;
    const int n = in.hr_rows ? static_cast<int>(query_at(in, tile.sample, min(r, last))) : min(r, last);
    const bool sees = r <= last && n >= 0 && (in.hr_rows || n >= in.hr_from[tile.sample]);
    return {states_of(p)[state_index(in, tile.sample, tile.head, max(n, 0))], {sees, r}};
  }
  __device__ void enter(const QueryTile& tile, const int (&rows)[2]) {
    for (int which = 0; which < 2; ++which) key[which] = key_at(tile.sample, rows[which]);
    sample_ = tile.sample;
  }
  __device__ bool visible(int which, int, const int2& sees) const {
    if (key[which] < 0 || !sees.x) return false;
    const int32_t* bits = row_bits(p.in, sample_, sees.y);
    return !bits || bit(bits, key[which]);
  }

  __device__ T* gradient(void* data, int row) const {
    const int64_t at = first_slot + row, d = p.in.head_dim;
    return at < p.in.pool ? static_cast<T*>(data) + (at * p.in.kv_heads + kv_head) * d : nullptr;
  }
  __device__ void* grad_k() const { return p.grad_k_hr; }
  __device__ void* grad_v() const { return p.grad_v_hr; }

 private:
  int sample_ = 0;
};

// Shared memory: keys, values, passing queries and grad_out, and what is known of those queries.
template <typename Mma, int kWarps>
constexpr size_t key_tile_elements() {
  return 2 * 8 * kWarpRows * kWarps * Mma::kRowChunks + 2 * kPassingBuffers<Mma> * kPassingElements<Mma>;
}
template <typename Mma, int kWarps>
constexpr size_t key_shared_bytes() {
  return key_tile_elements<Mma, kWarps>() * sizeof(typename Mma::Element) +
         kPassingBuffers<Mma> * kPassingRows * sizeof(PassingQuery);
}

// S^T, dP^T and then P^T, dS^T of the warp's 16 keys and the passing queries.
template <typename Mma, typename Keys, typename T>
__device__ __forceinline__ void pair_with_queries(const Keys& keys, const T* own_keys, const T* own_values,
                                                  const T* queries, const T* grads, const PassingQuery* passing,
                                                  float scale, float alpha, float (&s)[kPassingScores],
                                                  float (&dp)[kPassingScores]) {
  Mma::multiply_rows(s, own_keys, queries);
  Mma::multiply_rows(dp, own_values, grads);
  passing += Mma::key_of_lane();
  const auto state = [&](int i) -> const QueryState& { return passing[Mma::key_of_score(i)].state; };
  const auto visible = [&](int i) {
    const int which = Mma::row_of(i);
    return keys.visible(which, block_row<Mma>(which), passing[Mma::key_of_score(i)].sees);
  };
  if (alpha == 1.f)
    weigh_pairs<Keys::kHr, false>(s, dp, scale, 1.f, state, visible);
  else
    weigh_pairs<Keys::kHr, true>(s, dp, scale, alpha, state, visible);
}

template <typename Mma, int kD, int kWarps, template <typename, int> class KeysOf>
__global__ void __launch_bounds__(kWarp* kWarps) grad_key_tiles(AttentionBackwardParams p) {
  using T = typename Mma::Element;
  using Keys = KeysOf<T, kWarps>;
  constexpr int kThreads = kWarp * kWarps, kOwn = 8 * Keys::kKeys * Mma::kRowChunks;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim), own_rows[2] = {block_row<Mma>(0), block_row<Mma>(1)};
  T *own_keys = shared_memory<T>(), *own_values = own_keys + kOwn;
  PassingQuery* known = reinterpret_cast<PassingQuery*>(own_keys + key_tile_elements<Mma, kWarps>());
  Keys keys(p, static_cast<int>(blockIdx.x), own_rows);
  load_own_rows<Mma, kD, Keys::kKeys, kThreads>(keys.keys(), d, own_keys);
  load_own_rows<Mma, kD, Keys::kKeys, kThreads>(keys.values(), d, own_values);

  PassingRows<Mma, kD, kThreads> passing;
  passing.buffers = own_values + kOwn;
  PassingQuery next_query;
  const auto issue = [&](const QueryTile& tile) {
    passing.issue(keys.queries(tile, in.q, in.q_strides), keys.queries(tile, p.grad_out, p.grad_out_strides), d);
    if (warp_in_block() == 0) next_query = keys.query(tile);
  };
  const auto commit = [&] {
    passing.commit();
    if (warp_in_block() == 0) known[passing.current * kPassingRows + lane()] = next_query;
  };

  float grad_k[Mma::kOutputs] = {}, grad_v[Mma::kOutputs] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);
  QueryTile tile = keys.first();
  bool more = keys.find(tile);
  if (more) {
    issue(tile);
    commit();
  }
  __syncthreads();

  const int own = 8 * kWarpRows * warp_in_block() * Mma::kRowChunks;
  while (more) {
    keys.enter(tile, own_rows);
    const float alpha = mixing<float>(in, tile.sample);
    tile.first += kPassingRows;
    more = keys.find(tile);
    if (more) issue(tile);
    float s[kPassingScores] = {}, dp[kPassingScores] = {};
    pair_with_queries<Mma>(keys, own_keys + own, own_values + own, passing.rows(0), passing.rows(1),
                           known + passing.current * kPassingRows, scale, alpha, s, dp);
    Mma::multiply_weights(grad_v, s, passing.rows(1));
    Mma::multiply_weights(grad_k, dp, passing.rows(0));
    if (more) commit();
    __syncthreads();
  }
  store_rows<Mma>(grad_k, static_cast<float>(in.scale), d,
                  [&](int which) { return keys.gradient(keys.grad_k(), own_rows[which]); });
  store_rows<Mma>(grad_v, 1.f, d, [&](int which) { return keys.gradient(keys.grad_v(), own_rows[which]); });
}

}  // namespace flexattn::cuda
