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
// With alpha, grad_row_tiles<..., true> takes the place of grad_row_states, as attention_backward_work.cuh says.
#pragma once

#include "attention_backward_work.cuh"
#include "attention_prefill.cuh"

namespace flexattn::cuda {

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

template <typename Mma>
struct RowTile {
  using T = typename Mma::Element;
  const AttentionInputs& in;
  const BlockWork& work;
  T* grads;
  RowStates<Mma> rows;
  Mma mma;

  __device__ VisibleKeys<Mma, uint32_t> visible(const KeyTile& tile, bool masked) const {
    return masked ? visible_keys<Mma, uint32_t>(in, work, tile) : VisibleKeys<Mma, uint32_t>{{~0u, ~0u}};
  }

  __device__ void multiply_keys(float (&s)[kPassingScores], const T* keys) const { multiply_all_keys(mma, s, keys); }
  __device__ void multiply_values(float (&dp)[kPassingScores], const T* values) const {
    Mma::multiply_rows(dp, rows_of_warp<Mma>(grads), values);
  }

  // s, dp: scores and dP, which become weights and dS.
  __device__ void weigh_keys(const KeyTile& tile, bool masked, float (&s)[kPassingScores], float (&dp)[kPassingScores],
                             float scale) const {
    const Weighing of_rows[2] = {tile.hr ? rows.states[0].hr : rows.states[0].sequence,
                                 tile.hr ? rows.states[1].hr : rows.states[1].sequence};
    const auto weighing = [&](int i) -> const Weighing& { return of_rows[Mma::row_of(i)]; };
    weigh(s, scale, weighing, visible(tile, masked));
    differentiate(dp, s, weighing);
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

  RowTile<Mma> tile{in, work, shared, {p, work}};
  load_query(tile.mma, in, work);
  load_own_rows<Mma, kD, kTileRows, kTileThreads>(
      TileRows<T>{row_of<T>(p.grad_out, p.grad_out_strides, work.sample, work.head, 0),
                  row_bytes<T>(p.grad_out_strides), nullptr, work.first_row, static_cast<int>(in.queries) - 1},
      d, tile.grads);
  if constexpr (kStates)
    tile.rows.begin();
  else
    tile.rows.read();
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
    const bool masked = !work.sees_all(current);
    if (!kStates && masked && clear_unseen_rows<Mma, kPassingRows>(in, work, current, passing.rows(0))) __syncthreads();
    ++keys.half;
    keys.find();
    if (keys.exists()) issue(keys.tile());
    float s[kPassingScores] = {}, dp[kPassingScores] = {};
    tile.multiply_keys(s, passing.rows(0));
    tile.multiply_values(dp, passing.rows(1));
    if constexpr (kStates) {
      tile.rows.add_to_d(current.hr, tile.visible(current, masked), s, dp, scale);
    } else {
      tile.weigh_keys(current, masked, s, dp, scale);
      Mma::multiply_weights(grad_q, dp, passing.rows(0));
    }
    if (keys.exists()) passing.commit(d);
    __syncthreads();
  }

  if constexpr (kStates) {
    tile.rows.write();
  } else {
    store_rows<Mma>(grad_q, static_cast<float>(in.scale), d,
                    [&](int which) { return gradient_of_row<Mma>(p, work, which); });
  }
}

// ------------------------------------------------------------------------------------------------ a block of keys

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
    const int key[2] = {keys.key_of(p, tile, rows[0]), keys.key_of(p, tile, rows[1])};
    tile.first += kPassingRows;
    more = keys.find(p, tile);
    if (more) issue();

    float s[kPassingScores] = {}, dp[kPassingScores] = {};
    Mma::multiply_rows(s, rows_of_warp<Mma>(own_keys), passing.rows(0));
    weigh(s, scale, weighing,
          [&](int i) { return Keys::visible(in, current, key[Mma::row_of(i)], sights[Mma::key_of_score(i)]); });
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
