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

#include "row_steps.cuh"

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

// ------------------------------------------------------------------------------------------------------ the kernel

template <typename Mma, int kD>
__global__ void __launch_bounds__(kTileThreads, 2) prefill_tiles(AttentionForwardParams p, BlockOrder order) {
  using T = typename Mma::Element;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T* keys = shared_memory<T>();
  T* values = keys + kTileElements<Mma>;
  BlockWork& work = *reinterpret_cast<BlockWork*>(values + kTileElements<Mma>);
  describe_work(in, order, work);

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
