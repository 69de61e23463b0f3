// N x (N+M) attention on tensor cores (float16, bfloat16; head sizes up to 128), as FlashAttention streams it: a block
// owns 64 query rows of one head, a warp 16 of them, and tiles of 64 keys pass by, first those of the sequence, then
// the sample's high-resolution keys. Scores, probabilities and outputs stay in registers.
//
//   for each tile:   S = Q K^T        while V of this tile is loaded
//                    softmax          (registers)
//                    O += P V         while K of the next tile is loaded
//
// K and V have one buffer each: while one is multiplied, the other is filled.
#pragma once

#include "prefill_work.cuh"

namespace flexattn::cuda {

// Shared memory: keys, values, work.
template <typename Mma>
constexpr size_t tile_bytes() {
  return 2 * kTileElements<Mma> * sizeof(typename Mma::Element);
}
template <typename Mma>
size_t prefill_shared_bytes(int64_t selected) {
  return tile_bytes<Mma>() + work_bytes(selected);
}

// -------------------------------------------------------------------------------------------- the steps of the loop

template <typename Mma>
__device__ __forceinline__ void load_query(Mma& mma, const AttentionInputs& in, const BlockWork& work) {
  const int warp_row = work.first_row + warp_in_block() * kWarpRows, last = static_cast<int>(in.queries) - 1;
  mma.load_query(
      [&](int row) {
        return row_of<typename Mma::Element>(in.q, in.q_strides, work.sample, work.head, min(warp_row + row, last));
      },
      static_cast<int>(in.head_dim));
}

template <typename Mma, int kD, typename T>
__device__ __forceinline__ void load_keys(TileCopy<Mma, kD>& copy, const TileRows<T>& rows, int d, T* keys) {
  copy.template issue<KeyLayout<Mma>, 0>(rows, d, keys);
  unrolled<Mma::kParts>([&](auto part) { copy.template advance<KeyLayout<Mma>, part.value>(rows, d, keys); });
}

// s = Q K^T; meanwhile the values of the tile are loaded.
template <typename Mma, int kD, typename T>
__device__ __forceinline__ void multiply_keys(const Mma& mma, float (&s)[Mma::kScores], const T* keys,
                                              TileCopy<Mma, kD>& copy, const TileRows<T>& value_rows, int d,
                                              T* values) {
  copy.template issue<ValueLayout<Mma>, 0>(value_rows, d, values);
  unrolled<Mma::kParts>([&](auto part) {
    mma.template multiply_keys<part.value>(s, keys);
    copy.template advance<ValueLayout<Mma>, part.value>(value_rows, d, values);
  });
}

// out += P V; meanwhile the keys of the next tile are loaded, if there is one. Their first part has been issued.
template <typename Mma, int kD, typename T>
__device__ __forceinline__ void multiply_values(float (&out)[Mma::kOutputs], const float (&p)[Mma::kScores],
                                                const T* values, TileCopy<Mma, kD>& copy, bool more,
                                                const TileRows<T>& next_rows, int d, T* keys) {
  unrolled<Mma::kParts>([&](auto part) {
    Mma::template multiply_values<part.value>(out, p, values);
    if (more) copy.template advance<KeyLayout<Mma>, part.value>(next_rows, d, keys);
  });
}

template <typename Mma>
__device__ __forceinline__ void mask_scores(const AttentionInputs& in, const BlockWork& work, const KeyTile& tile,
                                            float (&s)[Mma::kScores]) {
  uint64_t visible[2];
#pragma unroll
  for (int which = 0; which < 2; ++which)
    visible[which] = work.visible_keys<uint64_t>(in, tile, block_row<Mma>(which)) >> Mma::key_of_lane();
#pragma unroll
  for (int i = 0; i < Mma::kScores; ++i)
    if (!(visible[Mma::row_of(i)] >> Mma::key_of_score(i) & 1)) s[i] = -INFINITY;
}

// Turn scores into weights. The lanes of a row share its row_max; each has the row_sum of its own columns.
template <typename Mma>
__device__ __forceinline__ void softmax_step(float (&s)[Mma::kScores], float scale, SoftmaxState<float> (&softmax)[2],
                                             float (&out)[Mma::kOutputs]) {
  float rescale[2];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float max_score = -INFINITY;
#pragma unroll
    for (int i = 0; i < Mma::kScores; ++i)
      if (Mma::row_of(i) == which) max_score = fmaxf(max_score, s[i]);
    max_score = Mma::over_row(max_score, [](float x, float y) { return fmaxf(x, y); });
    rescale[which] = softmax[which].raise_max(scale * max_score);
#pragma unroll
    for (int i = 0; i < Mma::kScores; ++i)
      if (Mma::row_of(i) == which) {
        s[i] = softmax[which].weight(scale * s[i]);
        softmax[which].row_sum += s[i];
      }
  }
#pragma unroll
  for (int i = 0; i < Mma::kOutputs; ++i) out[i] *= rescale[Mma::row_of(i)];
}

// -------------------------------------------------------------------------------------------------------- the end

// Write two neighbouring channels.
template <typename T>
__device__ __forceinline__ void store_pair(T* at, float first, float second) {
  alignas(4) const T both[2] = {narrow<T>(first), narrow<T>(second)};
  *reinterpret_cast<uint32_t*>(at) = *reinterpret_cast<const uint32_t*>(both);
}

// Write the log-sum-exps [B, H, N] of the lane's rows, and return in `normalizer` what their outputs are multiplied by.
template <typename Mma>
__device__ __forceinline__ void write_lse(const AttentionForwardParams& p, const BlockWork& work, void* lse,
                                          const SoftmaxState<float> (&softmax)[2], float (&normalizer)[2]) {
  const int64_t first = (work.sample * p.in.heads + work.head) * p.in.queries + work.first_row;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    SoftmaxState<float> row = softmax[which];
    row.row_sum = Mma::over_row(row.row_sum, [](float x, float y) { return x + y; });
    normalizer[which] = row.average(1.f);
    if (Mma::first_of_row() && block_row<Mma>(which) < work.rows)
      static_cast<float*>(lse)[first + block_row<Mma>(which)] = row.log_sum_exp();
  }
}

// Write share * out + keep * what is there.
template <typename Mma>
__device__ __forceinline__ void write_out(const AttentionForwardParams& p, const BlockWork& work,
                                          const float (&out)[Mma::kOutputs], const float (&share)[2],
                                          const float (&keep)[2]) {
  using T = typename Mma::Element;
  const int d = static_cast<int>(p.in.head_dim);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int row = block_row<Mma>(which);
    if (row >= work.rows) continue;
    T* to = static_cast<T*>(p.out) +
            ((work.sample * p.in.queries + work.first_row + row) * p.in.heads + work.head) * d + Mma::channel_of_lane();
#pragma unroll
    for (int i = 0; i < Mma::kOutputs; i += 2) {  // two neighbouring channels
      if (Mma::row_of(i) != which || Mma::channel_of_output(i) + Mma::channel_of_lane() >= d) continue;
      T* at = to + Mma::channel_of_output(i);
      float pair[2] = {share[which] * out[i], share[which] * out[i + 1]};
      if (keep[which] != 0.f) pair[0] += keep[which] * widen(at[0]), pair[1] += keep[which] * widen(at[1]);
      store_pair(at, pair[0], pair[1]);
    }
  }
}

// The sequence is done: write lse_seq and, where alpha mixes it in later, its output.
template <typename Mma>
__device__ __forceinline__ void finish_sequence(const AttentionForwardParams& p, const BlockWork& work,
                                                const SoftmaxState<float> (&softmax)[2],
                                                const float (&out)[Mma::kOutputs]) {
  float share[2];
  write_lse<Mma>(p, work, p.lse_seq, softmax, share);
  if (work.alpha != 1.f) write_out<Mma>(p, work, out, share, {0.f, 0.f});
}

// All keys are done: write lse and the output.
template <typename Mma>
__device__ __forceinline__ void finish_rows(const AttentionForwardParams& p, const BlockWork& work,
                                            const SoftmaxState<float> (&softmax)[2],
                                            const float (&out)[Mma::kOutputs]) {
  float share[2], keep[2] = {0.f, 0.f};
  write_lse<Mma>(p, work, p.lse, softmax, share);
#pragma unroll
  for (int which = 0; which < 2; ++which)
    if (work.alpha != 1.f && work.sees_hr(p.in, block_row<Mma>(which))) {
      share[which] *= work.alpha;
      keep[which] = 1.f - work.alpha;
    }
  write_out<Mma>(p, work, out, share, keep);
}

// ------------------------------------------------------------------------------------------------------ the kernel

template <typename Mma, int kD>
__global__ void __launch_bounds__(kTileThreads, 2) prefill_tiles(AttentionForwardParams p) {
  using T = typename Mma::Element;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T* keys = shared_memory<T>();
  T* values = keys + kTileElements<Mma>;
  BlockWork& work = *reinterpret_cast<BlockWork*>(values + kTileElements<Mma>);
  describe_work(in, work);

  Mma mma;
  load_query(mma, in, work);
  TileCopy<Mma, kD> copy;
  SoftmaxState<float> softmax[2];
  float out[Mma::kOutputs] = {};
  const float scale = static_cast<float>(in.scale * kLog2e);

  int t = work.seen_tile_from(in, 0);
  if (t < work.tiles) load_keys(copy, key_rows<T>(in, work.tile(t), work.sample, work.kv_head), d, keys);
  if (work.sequence_tiles == 0) finish_sequence<Mma>(p, work, softmax, out);
  __syncthreads();

  while (t < work.tiles) {
    const KeyTile tile = work.tile(t);
    float s[Mma::kScores] = {};
    multiply_keys(mma, s, keys, copy, value_rows<T>(in, tile, work.sample, work.kv_head), d, values);
    __syncthreads();  // V is loaded; K is no longer read
    const bool masked = !work.sees_all(in, tile);
    if (masked && clear_unseen_rows<Mma, kTileKeys>(in, work, tile, values)) __syncthreads();

    const int next = work.seen_tile_from(in, t + 1);
    const bool more = next < work.tiles;
    const TileRows<T> next_rows = key_rows<T>(in, work.tile(next), work.sample, work.kv_head);
    if (more) copy.template issue<KeyLayout<Mma>, 0>(next_rows, d, keys);

    cap_scores(in, s, scale);
    if (masked) mask_scores<Mma>(in, work, tile, s);
    softmax_step<Mma>(s, scale, softmax, out);
    multiply_values(out, s, values, copy, more, next_rows, d, keys);
    __syncthreads();  // the next K is loaded; V is no longer read

    if (!tile.hr && next >= work.sequence_tiles) finish_sequence<Mma>(p, work, softmax, out);
    t = next;
  }
  finish_rows<Mma>(p, work, softmax, out);
}

}  // namespace flexattn::cuda
