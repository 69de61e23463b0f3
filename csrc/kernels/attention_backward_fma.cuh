// Gradients of N x (N+M) attention without tensor cores: float32, and what tensor cores do not take of float16 and
// bfloat16. The kernels are those of attention_backward_tiles.cuh, but a block owns 64 rows and 64 pass by at a time;
// fma_tiles.cuh multiplies them.
//
//   grad_row_fma    owns queries; keys pass by                 grad_key_fma    owns keys; queries pass by
//
//     S = Q K^T                                                  S^T = K Q^T
//     P = exp(S - lse)                                           P^T = exp(S^T - lse)
//                                                                dV += P^T dO
//     dP = dO V^T                                                dP^T = V dO^T
//     dQ += P (dP - D) K                                         dK += P^T (dP^T - D) Q
//
// Weights pass through shared memory, on to the lanes of the whole row, and from before dP to after it.
#pragma once

#include "attention_backward_work.cuh"
#include "fma_tiles.cuh"

namespace flexattn::cuda {

// What a block multiplies: its rows of two tensors, and rows of two others that pass by.
template <typename T>
struct FmaOperands {
  float slices[2 * kSliceFloats], weights[kWeightFloats];
  typename ScoreSlices<T>::RowPointers rows[2];
};

// Scores of tensor 0 and of tensor 1, and sums of rows that pass by, weighted.
template <typename T, int kD>
struct FmaProducts {
  using Rows = FmaRows<T, kD>;
  FmaOperands<T>& shared;
  int d;
  SliceStream<T> stream{shared.slices};
  ScoreSlices<T> scores[2] = {{shared.rows[0]}, {shared.rows[1]}};

  // Start loading the first slice for scores with these rows, or of these rows themselves. Each product begins with
  // what was started last, and starts what follows it by `next`.
  __device__ __forceinline__ void start_scores(int tensor, const TileRows<T>& passing) {
    scores[tensor].set_keys(passing);
    scores[tensor].issue(stream, 0, d);
  }
  __device__ __forceinline__ void start_rows(const TileRows<T>& passing, uint64_t seen, int first = 0) {
    ValueSlices<T, kD>::issue(stream, passing, seen, first, d);
  }

  template <typename Next>
  __device__ __forceinline__ void multiply(int tensor, float (&s)[Rows::kScores], const Next& next) {
#pragma unroll
    for (int i = 0; i < Rows::kScores; ++i) s[i] = 0.f;
    multiply_keys(s, stream, scores[tensor], d, next);
  }
  // sum += weights times the first `count` rows. rows(): those that pass by; seen: see ValueSlices.
  template <typename PassingRows, typename Next>
  __device__ __forceinline__ void add(float (&sum)[Rows::kOutputs], int count, const PassingRows& rows,
                                      const uint64_t& seen, const Next& next) {
    multiply_values<T, kD>(
        sum, shared.weights, stream, min(kTileKeys, count), [&](int first) { start_rows(rows(), seen, first); }, next);
  }

  __device__ __forceinline__ void keep(const float (&weights)[Rows::kScores]) {
    store_weights<Rows>(weights, shared.weights);
  }
  // Keep the gradients of the logits in place of the weights, row by row: registers are scarce.
  template <typename WeighingOf>
  __device__ __forceinline__ void keep_gradients(float (&dp)[Rows::kScores], const WeighingOf& weighing) {
    float* lane = weights_of_lane<Rows>(shared.weights) + Rows::key_of_lane();
#pragma unroll
    for (int i = 0; i < Rows::kScores; i += 4) {
      float* at = lane + 2 * kWeightPitch * Rows::row_of(i);
      Floats weights = load<4>(at), gradients;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        gradients.element[j] = gradient_of_logit(dp[i + j], weights.element[j], weighing(i + j));
      store(at, gradients);
    }
  }
};

// --------------------------------------------------------------------------------------------- a block of queries

template <typename T>
struct FmaRowShared {
  FmaOperands<T> operands;
  Weighing weighings[2][kTileRows];  // of the keys of the sequence; of HR keys
  uint64_t seen;                     // keys of the tile that some row sees
  BlockWork work;                    // last: its list of tiles follows
};
template <typename T>
size_t fma_row_shared_bytes(int64_t selected) {
  return sizeof(FmaRowShared<T>) - sizeof(BlockWork) + work_bytes(selected);
}

// The whole block, before a barrier.
template <typename T>
__device__ void share_weighings(const AttentionBackwardParams& p, FmaRowShared<T>& shared) {
  const BlockWork& work = shared.work;
  for (int row = threadIdx.x; row < kTileRows; row += kTileThreads) {
    const int64_t n = work.first_row + min(row, work.rows - 1);
    const QueryState state = states_of(p)[state_index(p.in, work.sample, work.head, n)];
    shared.weighings[0][row] = state.sequence;
    shared.weighings[1][row] = state.hr;
  }
}

// The first warp, between two barriers.
template <typename T>
__device__ void share_seen_keys(const AttentionInputs& in, FmaRowShared<T>& shared, const KeyTile& tile) {
  if (warp_in_block() != 0) return;
  const BlockWork& work = shared.work;
  const uint64_t seen = work.sees_all<true>(tile) ? ~uint64_t{0} : seen_keys<uint64_t>(in, work, tile);
  if (lane() == 0) shared.seen = seen;
}

// kStates: find out how the queries weigh their keys; otherwise, their gradients.
template <typename T, int kD, bool kStates>
__global__ void __launch_bounds__(kTileThreads, 2) grad_row_fma(AttentionBackwardParams p, BlockOrder order) {
  using Rows = FmaRows<T, kD>;
  const AttentionInputs& in = p.in;
  FmaRowShared<T>& shared = *shared_memory<FmaRowShared<T>>();
  BlockWork& work = shared.work;
  describe_work(in, order, work);
  FmaProducts<T, kD> products{shared.operands, static_cast<int>(in.head_dim)};
  const int last = static_cast<int>(in.queries) - 1;
  products.scores[0].set_rows({row_of<T>(in.q, in.q_strides, work.sample, work.head, 0), row_bytes<T>(in.q_strides),
                               nullptr, work.first_row, last});
  products.scores[1].set_rows({row_of<T>(p.grad_out, p.grad_out_strides, work.sample, work.head, 0),
                               row_bytes<T>(p.grad_out_strides), nullptr, work.first_row, last});
  if (!kStates) share_weighings(p, shared);

  float grad_q[Rows::kOutputs] = {};
  RowStates<Rows> states{p, work};
  if (kStates) states.begin();
  const float scale = static_cast<float>(in.scale * kLog2e);
  int t = work.seen_tile_from(in, 0);
  // The tile is described anew for each slice: registers are scarcer here than instructions. And past the last one,
  // too: rows that stay what they were would take registers through the whole loop.
  const auto tile = [&] { return work.tile<true>(t); };
  const auto keys = [&] { return key_rows<T>(work, tile()); };
  const auto start_next = [&] {
    t = work.seen_tile_from(in, t + 1);
    products.start_scores(0, keys());
  };
  products.start_scores(0, keys());
  while (t < work.tiles) {
    float s[Rows::kScores], dp[Rows::kScores];
    products.multiply(0, s, [&] { products.start_scores(1, value_rows<T>(work, tile())); });
    if constexpr (kStates) {
      const KeyTile current = tile();
      products.multiply(1, dp, start_next);
      states.add_to_d(current.hr, visible_keys<Rows, uint64_t>(in, work, current), s, dp, scale);
    } else {
      const auto weighing = [&](int i) -> const Weighing& {
        return shared.weighings[tile().hr][block_row<Rows>(Rows::row_of(i))];
      };
      share_seen_keys(in, shared, tile());
      if (!work.sees_all<true>(tile())) mask_scores<Rows>(in, work, tile(), s);
      weigh(s, scale, weighing, [&](int i) { return s[i] != -INFINITY; });
      products.keep(s);
      products.multiply(1, dp, [&] { products.start_rows(keys(), shared.seen); });
      products.keep_gradients(dp, weighing);
      products.add(grad_q, tile().end - tile().first, keys, shared.seen, start_next);
    }
  }

  if constexpr (kStates) {
    states.write();
  } else {
    store_rows<Rows>(grad_q, static_cast<float>(in.scale), products.d,
                     [&](int which) { return gradient_of_row<Rows>(p, work, which); });
  }
}

// ------------------------------------------------------------------------------------------------ a block of keys

struct alignas(16) FoundTile {
  QueryTile tile;
  int exists;
};

// What a lane knows of the queries of its scores.
struct LaneQueries {
  PassingQuery query[4];
};

template <typename T, typename Keys>
struct FmaKeyShared {
  FmaOperands<T> operands;
  Weighing weighings[kTileKeys];  // of the queries that pass by, in the order of place()
  Sight sights[kTileKeys];
  FoundTile found[2];  // these queries, and those after them
  Keys keys;

  // Lanes read queries 4 l + j, which lie side by side.
  static __device__ int place(int query) { return query % 4 * (kTileKeys / 4) + query / 4; }

  __device__ __forceinline__ LaneQueries of_lane() const {
    LaneQueries queries;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = place(FmaRows<T, 64>::key_of_lane() + j);
      queries.query[j] = {weighings[at], sights[at]};
    }
    return queries;
  }
};

// Find the tile from `tile` on. The first warp, before a barrier.
template <typename T, typename Keys>
__device__ void find_tile(const AttentionBackwardParams& p, QueryTile tile, FmaKeyShared<T, Keys>& shared, int at) {
  if (warp_in_block() != 0) return;
  const int exists = shared.keys.find(p, tile);
  if (lane() == 0) shared.found[at] = {tile, exists};
}

// Describe the queries that pass by, a warp for 32 of them. Before a barrier, after another one.
template <typename T, typename Keys>
__device__ void describe_queries(const AttentionBackwardParams& p, QueryTile tile, FmaKeyShared<T, Keys>& shared) {
  const int part = warp_in_block();
  if (part >= kTileKeys / kPassingRows) return;
  tile.first += part * kPassingRows;
  const PassingQuery query = shared.keys.query(p, tile);
  const int at = shared.place(part * kPassingRows + lane());
  shared.weighings[at] = query.weighing;
  shared.sights[at] = query.sight;
}

// kOfKeys, kOfValues: the gradients to compute. Both of 256 channels would not fit the registers.
template <typename T, int kD, bool kOfKeys, bool kOfValues, template <typename, int> class KeysOf>
__global__ void __launch_bounds__(kTileThreads, 2) grad_key_fma(AttentionBackwardParams p, BlockOrder order) {
  using Rows = FmaRows<T, kD>;
  using Keys = KeysOf<T, kTileThreads / kWarp>;
  const AttentionInputs& in = p.in;
  FmaKeyShared<T, Keys>& shared = *shared_memory<FmaKeyShared<T, Keys>>();
  Keys& keys = shared.keys;
  if (threadIdx.x == 0) keys.start(in, order.place(static_cast<int>(blockIdx.x)));
  __syncthreads();
  FmaProducts<T, kD> products{shared.operands, static_cast<int>(in.head_dim)};
  products.scores[0].set_rows(keys.keys(in));
  products.scores[1].set_rows(keys.values(in));

  float grad_k[kOfKeys ? Rows::kOutputs : 1] = {}, grad_v[kOfValues ? Rows::kOutputs : 1] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);
  constexpr uint64_t kAll = ~uint64_t{0};
  find_tile(p, keys.first_tile(), shared, 0);
  __syncthreads();
  int at = 0;  // of the tile that passes by, in shared memory since registers are scarce
  const auto queries = [&](int which) { return keys.queries(in, shared.found[which].tile, in.q, in.q_strides); };
  const auto grads = [&] { return keys.queries(in, shared.found[at].tile, p.grad_out, p.grad_out_strides); };
  const auto start_tile = [&](int which) {
    if (shared.found[which].exists) products.start_scores(0, queries(which));
  };

  start_tile(0);
  for (; shared.found[at].exists; at ^= 1) {
    QueryTile next = shared.found[at].tile;
    describe_queries(p, next, shared);
    next.first += kTileKeys;
    find_tile(p, next, shared, at ^ 1);

    float s[Rows::kScores];
    products.multiply(0, s,
                      [&] { kOfValues ? products.start_rows(grads(), kAll) : products.start_scores(1, grads()); });
    int key[Rows::kLaneRows];
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which)
      key[which] = keys.key_of(p, shared.found[at].tile, block_row<Rows>(which));
    const LaneQueries known = shared.of_lane();
    weigh(
        s, scale, [&](int i) { return known.query[Rows::key_of_score(i)].weighing; },
        [&](int i) {
          return Keys::visible(in, shared.found[at].tile, key[Rows::row_of(i)],
                               known.query[Rows::key_of_score(i)].sight);
        });
    products.keep(s);
    const int count = keys.end_of_queries - shared.found[at].tile.first;
    if constexpr (kOfValues)
      products.add(grad_v, count, grads, kAll,
                   [&] { kOfKeys ? products.start_scores(1, grads()) : start_tile(at ^ 1); });
    if constexpr (kOfKeys) {
      products.multiply(1, s, [&] { products.start_rows(queries(at), kAll); });
      const LaneQueries again = shared.of_lane();
      products.keep_gradients(s, [&](int i) { return again.query[Rows::key_of_score(i)].weighing; });
      products.add(grad_k, count, [&] { return queries(at); }, kAll, [&] { start_tile(at ^ 1); });
    }
  }
  const auto row_of_gradient = [&](void* data) {
    return [&, data](int which) { return keys.gradient(p, data, block_row<Rows>(which)); };
  };
  if constexpr (kOfKeys)
    store_rows<Rows>(grad_k, static_cast<float>(in.scale), products.d, row_of_gradient(Keys::grad_k(p)));
  if constexpr (kOfValues) store_rows<Rows>(grad_v, 1.f, products.d, row_of_gradient(Keys::grad_v(p)));
}

}  // namespace flexattn::cuda
