// N x (N+M) attention without tensor cores: float32, and what tensor cores do not take of float16 and bfloat16. The
// blocks and tiles are those of attention_prefill.cuh; fma_tiles.cuh multiplies them.
//
//   for each tile:   S = Q K^T        16 channels at a time
//                    softmax          (registers)
//                    O += P V         8 to 32 keys at a time; P passes through shared memory, from lane to lane
#pragma once

#include "attention_map_tiles.cuh"
#include "fma_tiles.cuh"
#include "row_steps.cuh"

namespace flexattn::cuda {

// The softmax of each thread's rows between two softmax steps, in shared memory: the outputs of 256 channels leave no
// registers for it.
struct KeptSoftmax {
  static constexpr int kRows = FmaRows<float, 64>::kLaneRows;
  SoftmaxState<float> states[kRows][kTileThreads];

  __device__ __forceinline__ void load(SoftmaxState<float> (&softmax)[kRows]) const {
#pragma unroll
    for (int which = 0; which < kRows; ++which) softmax[which] = states[which][threadIdx.x];
  }
  __device__ __forceinline__ void store(const SoftmaxState<float> (&softmax)[kRows]) {
#pragma unroll
    for (int which = 0; which < kRows; ++which) states[which][threadIdx.x] = softmax[which];
  }
};

template <typename T>
struct FmaShared {
  float slices[2 * kSliceFloats], weights[kWeightFloats];
  KeptSoftmax softmax;
  typename ScoreSlices<T>::RowPointers rows;
  BlockWork work;  // last: its list of tiles follows
};
template <typename T>
size_t fma_shared_bytes(int64_t selected) {
  return sizeof(FmaShared<T>) - sizeof(BlockWork) + work_bytes(selected);
}

template <typename T>
struct FmaMapShared {
  float slices[2 * kSliceFloats];
  typename ScoreSlices<T>::RowPointers rows;
  MapWork work;
};

// Cap scores, which `scale` turns into logits in base 2, to the precision of float32.
template <int n>
__device__ __forceinline__ void cap_scores_precisely(const AttentionInputs& in, float (&s)[n], float scale) {
  if (!(in.softcap > 0)) return;
  const float softcap = static_cast<float>(in.softcap * kLog2e) / scale;
#pragma unroll
  for (int i = 0; i < n; ++i) s[i] = cap(s[i], softcap);
}

template <typename T, int kD>
__global__ void __launch_bounds__(kTileThreads, 2) prefill_fma(AttentionForwardParams p, BlockOrder order) {
  using Rows = FmaRows<T, kD>;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  FmaShared<T>& shared = *shared_memory<FmaShared<T>>();
  BlockWork& work = shared.work;
  describe_work(in, order, work);

  SliceStream<T> stream{shared.slices};
  ScoreSlices<T> scores{shared.rows};
  scores.set_rows({row_of<T>(in.q, in.q_strides, work.sample, work.head, 0), row_bytes<T>(in.q_strides), nullptr,
                   work.first_row, static_cast<int>(in.queries) - 1});
  const auto issue_keys = [&](int t) {
    if (t >= work.tiles) return;
    scores.set_keys(key_rows<T>(work, work.tile(t)));
    scores.issue(stream, 0, d);
  };
  SoftmaxState<float> softmax[Rows::kLaneRows];
  float out[Rows::kOutputs] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);

  int t = work.seen_tile_from(in, 0);
  issue_keys(t);
  shared.softmax.store(softmax);
  if (work.sequence_tiles == 0) finish_sequence<Rows>(p, work, softmax, out);
  while (t < work.tiles) {
    // Tiles and rows are described anew wherever they are asked for: registers are scarcer here than instructions.
    const int number = t;
    const auto tile = [&] { return work.tile(number); };
    const bool masked = !work.sees_all(tile());
    const uint64_t seen = masked ? seen_keys<uint64_t>(in, work, tile()) : ~uint64_t{0};
    const auto issue_values = [&](int key) {
      const TileRows<T> rows = value_rows<T>(work, tile());
      ValueSlices<T, kD>::issue(stream, rows, seen, key, d);
    };
    float s[Rows::kScores] = {};
    multiply_keys(s, stream, scores, d, [&] { issue_values(0); });
    cap_scores_precisely(in, s, scale);
    if (masked) mask_scores<Rows>(in, work, tile(), s);
    shared.softmax.load(softmax);
    float rescale[Rows::kLaneRows];
    softmax_step<Rows>(s, scale, softmax, rescale);
    scale_outputs<Rows>(out, rescale);
    shared.softmax.store(softmax);
    store_weights<Rows>(s, shared.weights);
    t = work.seen_tile_from(in, t + 1);
    multiply_values<T, kD>(out, shared.weights, stream, min(kTileKeys, tile().end - tile().first), issue_values,
                           [&] { issue_keys(t); });

    if (tile().hr || t < work.sequence_tiles) continue;
    shared.softmax.load(softmax);
    finish_sequence<Rows>(p, work, softmax, out);
  }
  shared.softmax.load(softmax);
  finish_rows<Rows>(p, work, softmax, out);
}

// The map, from scores that are computed again; see attention_map_tiles.cuh.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) map_fma(AttentionForwardParams p) {
  using Rows = FmaRows<T, 64>;  // the scores of a lane are the same for every head size
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim), heads = static_cast<int>(in.heads);
  FmaMapShared<T>& shared = *shared_memory<FmaMapShared<T>>();
  MapWork& work = shared.work;
  describe_map(p, work);

  SliceStream<T> stream{shared.slices};
  ScoreSlices<T> scores{shared.rows};
  MapSums<Rows, Rows::kScores, kMapCells> sums(p, work);
  const auto issue_head = [&](int head) {
    if (head >= heads) return;
    scores.set_rows({row_of<T>(in.q, in.q_strides, work.sample, head, 0), row_bytes<T>(in.q_strides), work.query, 0,
                     kTileRows - 1});
    scores.set_keys(keys_of_cells<T>(p, work, head, 0));
    scores.issue(stream, 0, d);
  };
  const float scale = static_cast<float>(in.scale * kLog2e);
  if (work.keys.begin < work.keys.end) {
    issue_head(0);
    for (int head = 0; head < heads; ++head) {
      float s[Rows::kScores] = {}, lse[Rows::kLaneRows];
      multiply_keys(s, stream, scores, d, [&] { issue_head(head + 1); });
      cap_scores_precisely(in, s, scale);
      sums.read_lse(head, lse);
      sums.template add<0>(s, scale, lse);
    }
  }
  sums.write();
}

}  // namespace flexattn::cuda
