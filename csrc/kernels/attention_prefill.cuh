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

template <typename Mma, int kD>
using PrefillCopy = TileCopy<Mma, kD, kTileKeys, kTileThreads, Mma::kParts, true>;

// Where the lane's first chunks of keys and of values lie. Ampere's kernels have registers to keep them in.
template <typename Mma>
struct LanePlaces {
  int of_keys = Mma::kAsync ? opaque(Mma::first_of_keys()) : 0;
  int of_values = Mma::kAsync ? opaque(Mma::first_of_values()) : 0;
  __device__ int keys() const { return Mma::kAsync ? of_keys : Mma::first_of_keys(); }
  __device__ int values() const { return Mma::kAsync ? of_values : Mma::first_of_values(); }
};

// The first tile has nothing to hide behind: all of it is in flight at once.
template <typename Mma, int kD, typename T>
__device__ __forceinline__ void load_keys(PrefillCopy<Mma, kD>& copy, const TileRows<T>& rows, int d, T* keys) {
  TileCopy<Mma, kD, kTileKeys, kTileThreads, 1>().template load<KeyLayout<Mma>>(rows, d, keys);
  copy.find(rows);
}

// s = Q K^T; meanwhile the values of the tile are loaded, from the rows that its keys had.
template <typename Mma, int kD, typename T>
__device__ __forceinline__ void multiply_keys(const Mma& mma, const LanePlaces<Mma>& places, float (&s)[Mma::kScores],
                                              const T* keys, PrefillCopy<Mma, kD>& copy, const TileRows<T>& value_rows,
                                              int d, T* values) {
  copy.template start<ValueLayout<Mma>>(value_rows, d, values);
  const int first = places.keys();
  unrolled<Mma::kParts>([&](auto part) {
    mma.template multiply_keys<part.value>(s, keys, first);
    copy.template advance<ValueLayout<Mma>, part.value>(value_rows, d, values);
  });
}

// out += P V; meanwhile the keys of the next tile are loaded, which has been started.
template <typename Mma, int kD, typename T>
__device__ __forceinline__ void multiply_values(const Mma& mma, const LanePlaces<Mma>& places,
                                                float (&out)[Mma::kOutputs], const float (&p)[Mma::kScores],
                                                const T* values, PrefillCopy<Mma, kD>& copy,
                                                const TileRows<T>& next_rows, int d, T* keys) {
  typename Mma::Weights weights;
  const int first = places.values();
  unrolled<Mma::kParts>([&](auto part) {
    mma.template multiply_values<part.value>(out, p, weights, values, first);
    copy.template advance<KeyLayout<Mma>, part.value>(next_rows, d, keys);
  });
}

// ------------------------------------------------------------------------------------------------------ the kernel

template <typename Mma, int kD>
__global__ void __launch_bounds__(kTileThreads, 2)
    prefill_tiles(AttentionForwardParams p, BlockOrder order, float scale) {
  using T = typename Mma::Element;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T* keys = shared_memory<T>();
  T* values = keys + kTileElements<Mma>;
  BlockWork& work = *reinterpret_cast<BlockWork*>(values + kTileElements<Mma>);
  clear_rows<Mma, kD>(keys, 2 * kTileKeys, d);
  describe_work(in, order, work);

  Mma mma;
  load_query(mma, in, work);
  const LanePlaces<Mma> places;
  PrefillCopy<Mma, kD> copy;
  SoftmaxState<float> softmax[2];
  float out[Mma::kOutputs] = {};

  int t = work.seen_tile_from(in, 0);
  if (t < work.tiles) load_keys(copy, key_rows<T>(work, work.tile(t)), d, keys);
  if (work.sequence_tiles == 0) finish_sequence<Mma>(p, work, softmax, out);
  __syncthreads();

  while (t < work.tiles) {
    const bool masked = !work.sees_all(work.tile(t));
    float s[Mma::kScores] = {};
    multiply_keys(mma, places, s, keys, copy, value_rows<T>(work, work.tile(t)), d, values);
    __syncthreads();  // V is loaded; K is no longer read
    if (masked && clear_unseen_rows<Mma, kTileKeys>(in, work, work.tile(t), values)) __syncthreads();

    const int next = work.seen_tile_from(in, t + 1);
    const TileRows<T> next_rows = key_rows<T>(work, work.tile(next));
    copy.find(next_rows);
    copy.template start<KeyLayout<Mma>>(next_rows, d, keys);

    cap_scores(in, s, scale);
    if (masked) mask_scores<Mma>(in, work, work.tile(t), s);
    float rescale[2];
    softmax_step<Mma>(s, scale, softmax, rescale);
    if (votes(rescale[0] != 1.f || rescale[1] != 1.f)) scale_outputs<Mma>(out, rescale);
    multiply_values(mma, places, out, s, values, copy, next_rows, d, keys);
    __syncthreads();  // the next K is loaded; V is no longer read

    if (t < work.sequence_tiles && next >= work.sequence_tiles) finish_sequence<Mma>(p, work, softmax, out);
    t = next;
  }
  finish_rows<Mma>(p, work, softmax, out);
}

}  // namespace flexattn::cuda
