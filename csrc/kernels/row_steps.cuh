// What the kernels of 64 query rows do with the scores and outputs that their lanes hold: mask, softmax, write.
//
// `Rows` says which lane holds what of a warp's 16 rows: VoltaMma, AmpereMma, FmaRows. A lane holds parts of kLaneRows
// rows; its scores and outputs are numbered alike, and kNeighbours outputs in turn are neighbouring channels.
#pragma once

#include "prefill_work.cuh"
#include "vector.cuh"

namespace flexattn::cuda {

// What the lane's rows see of a tile, as bits from the lane's own first key on.
template <typename Rows, typename Word>
struct VisibleKeys {
  Word keys[Rows::kLaneRows];
  __device__ __forceinline__ bool operator()(int i) const { return keys[Rows::row_of(i)] >> Rows::key_of_score(i) & 1; }
};
template <typename Rows, typename Word>
__device__ __forceinline__ VisibleKeys<Rows, Word> visible_keys(const AttentionInputs& in, const BlockWork& work,
                                                                const KeyTile& tile) {
  VisibleKeys<Rows, Word> visible;
#pragma unroll
  for (int which = 0; which < Rows::kLaneRows; ++which)
    visible.keys[which] = work.visible_keys<Word>(in, tile, block_row<Rows>(which)) >> Rows::key_of_lane();
  return visible;
}

template <typename Rows>
__device__ __forceinline__ void mask_scores(const AttentionInputs& in, const BlockWork& work, const KeyTile& tile,
                                            float (&s)[Rows::kScores]) {
  const auto visible = visible_keys<Rows, uint64_t>(in, work, tile);
#pragma unroll
  for (int i = 0; i < Rows::kScores; ++i)
    if (!visible(i)) s[i] = -INFINITY;
}

// The reference of a row's weights follows its max only when that is 2^8 ahead: a weight of 256 is as precise as one of
// 1, and sums need rescaling only now and then.
constexpr float kSoftmaxSlack = 8.f;

// The number of the lane's first score of a row.
template <typename Rows>
FLEXATTN_HOST_DEVICE constexpr int first_score(int which) {
  int i = 0;
  while (Rows::row_of(i) != which) ++i;
  return i;
}

// Turn scores into weights. The lanes of a row share its row_max; each has the row_sum of its own columns. Return in
// `rescale` what outputs so far must be multiplied by.
template <typename Rows>
__device__ __forceinline__ void softmax_step(float (&s)[Rows::kScores], float scale,
                                             SoftmaxState<float> (&softmax)[Rows::kLaneRows],
                                             float (&rescale)[Rows::kLaneRows]) {
#pragma unroll
  for (int which = 0; which < Rows::kLaneRows; ++which) {
    float max_score = s[first_score<Rows>(which)];
#pragma unroll
    for (int i = 0; i < Rows::kScores; ++i)
      if (Rows::row_of(i) == which) max_score = fmaxf(max_score, s[i]);
    max_score = Rows::over_row(max_score, [](float x, float y) { return fmaxf(x, y); });
    rescale[which] = softmax[which].raise_max(scale * max_score, kSoftmaxSlack);
#pragma unroll
    for (int i = 0; i < Rows::kScores; ++i)
      if (Rows::row_of(i) == which) {
        s[i] = softmax[which].weight(scale * s[i]);
        softmax[which].row_sum += s[i];
      }
  }
}

template <typename Rows>
__device__ __forceinline__ void scale_outputs(float (&out)[Rows::kOutputs], const float (&factor)[Rows::kLaneRows]) {
#pragma unroll
  for (int i = 0; i < Rows::kOutputs; ++i) out[i] *= factor[Rows::row_of(i)];
}

// -------------------------------------------------------------------------------------------------------- the end

// Write factor * x to n neighbouring channels.
template <int n, typename T>
__device__ __forceinline__ void store_scaled(T* at, float factor, const float* x) {
  Vector<T, n> scaled;
#pragma unroll
  for (int i = 0; i < n; ++i) scaled.element[i] = narrow<T>(factor * x[i]);
  store(at, scaled);
}

// Write share * x + keep * what is there.
template <int n, typename T>
__device__ __forceinline__ void store_mixed(T* at, float share, const float* x, float keep) {
  const Vector<T, n> there = load<n>(at);
  Vector<T, n> mixed;
#pragma unroll
  for (int i = 0; i < n; ++i) mixed.element[i] = narrow<T>(share * x[i] + keep * widen(there.element[i]));
  store(at, mixed);
}

// Write the log-sum-exps [B, H, N] of the lane's rows, and return in `normalizer` what their outputs are multiplied by.
template <typename Rows>
__device__ __forceinline__ void write_lse(const AttentionForwardParams& p, const BlockWork& work, void* lse,
                                          const SoftmaxState<float> (&softmax)[Rows::kLaneRows],
                                          float (&normalizer)[Rows::kLaneRows]) {
  const int64_t first = (work.sample * p.in.heads + work.head) * p.in.queries + work.first_row;
#pragma unroll
  for (int which = 0; which < Rows::kLaneRows; ++which) {
    SoftmaxState<float> row = softmax[which];
    row.row_sum = Rows::over_row(row.row_sum, [](float x, float y) { return x + y; });
    normalizer[which] = row.average(1.f);
    if (Rows::first_of_row() && block_row<Rows>(which) < work.rows)
      static_cast<float*>(lse)[first + block_row<Rows>(which)] = row.log_sum_exp();
  }
}

// Write share * out + keep * what is there.
template <typename Rows>
__device__ __forceinline__ void write_out(const AttentionForwardParams& p, const BlockWork& work,
                                          const float (&out)[Rows::kOutputs], const float (&share)[Rows::kLaneRows],
                                          const float (&keep)[Rows::kLaneRows]) {
  using T = typename Rows::Element;
  constexpr int n = Rows::kNeighbours;
  const int d = static_cast<int>(p.in.head_dim);
#pragma unroll
  for (int which = 0; which < Rows::kLaneRows; ++which) {
    const int row = block_row<Rows>(which);
    if (row >= work.rows) continue;
    T* to = static_cast<T*>(p.out) +
            ((work.sample * p.in.queries + work.first_row + row) * p.in.heads + work.head) * d +
            Rows::channel_of_lane();
#pragma unroll
    for (int i = 0; i < Rows::kOutputs; i += n) {
      if (Rows::row_of(i) != which || Rows::channel_of_output(i) + Rows::channel_of_lane() >= d) continue;
      T* at = to + Rows::channel_of_output(i);
      if (keep[which] == 0.f)
        store_scaled<n>(at, share[which], out + i);
      else
        store_mixed<n>(at, share[which], out + i, keep[which]);
    }
  }
}

// The sequence is done: write lse_seq and, where alpha mixes it in later, its output.
template <typename Rows>
__device__ __forceinline__ void finish_sequence(const AttentionForwardParams& p, const BlockWork& work,
                                                const SoftmaxState<float> (&softmax)[Rows::kLaneRows],
                                                const float (&out)[Rows::kOutputs]) {
  float share[Rows::kLaneRows];
  const float keep[Rows::kLaneRows] = {};
  write_lse<Rows>(p, work, p.lse_seq, softmax, share);
  if (work.alpha != 1.f) write_out<Rows>(p, work, out, share, keep);
}

// All keys are done: write lse and the output.
template <typename Rows>
__device__ __forceinline__ void finish_rows(const AttentionForwardParams& p, const BlockWork& work,
                                            const SoftmaxState<float> (&softmax)[Rows::kLaneRows],
                                            const float (&out)[Rows::kOutputs]) {
  float share[Rows::kLaneRows], keep[Rows::kLaneRows] = {};
  write_lse<Rows>(p, work, p.lse, softmax, share);
#pragma unroll
  for (int which = 0; which < Rows::kLaneRows; ++which)
    if (work.alpha != 1.f && work.sees_hr(p.in, block_row<Rows>(which))) {
      share[which] *= work.alpha;
      keep[which] = 1.f - work.alpha;
    }
  write_out<Rows>(p, work, out, share, keep);
}

}  // namespace flexattn::cuda
