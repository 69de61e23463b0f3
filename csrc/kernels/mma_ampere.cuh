// Tensor cores from Ampere on: mma.m16n8k16, and which lane holds what of a warp's 16 query rows.
//
//   lane = 4 g + t                           t: 0..3
//   a[0..3]  rows g, g + 8, g, g + 8 at k = 2 t, 2 t + 1; from a[2] on at k + 8
//   b[0..1]  column g at k = 2 t, 2 t + 1 and at k + 8
//   d[0..3]  row g at columns 2 t, 2 t + 1; row g + 8 at the same
//
// d of the scores has the layout of a for the product with the values: the probabilities never leave their lane.
#pragma once

#include "launch.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace flexattn::cuda {

// T: __half or __nv_bfloat16. The rest as in VoltaMma.
template <typename T, int kD>
struct AmpereMma {
  using Element = T;
  static constexpr int kScores = 32, kOutputs = kD / 2;
  static constexpr int kLaneRows = 2, kNeighbours = 2;  // see row_steps.cuh
  static constexpr int kRowChunks = kD <= 64 ? 8 : 16;
  static constexpr bool kAsync = true;  // cp.async brings tiles to shared memory in one part
  static constexpr int kParts = 1;

  // ldmatrix reads one chunk of 8 consecutive rows at a time.
  static constexpr bool kOneLayout = true;  // of keys and values
  static __device__ int key_chunk(int row, int chunk) { return chunk ^ (row & 7); }
  static __device__ int value_chunk(int row, int chunk) { return chunk ^ (row & 7); }

  static __device__ int g() { return lane() / 4; }
  static __device__ int t() { return lane() % 4; }

  FLEXATTN_HOST_DEVICE static constexpr int row_of(int i) { return (i >> 1) & 1; }
  static __device__ int row(int which) { return g() + 8 * which; }
  FLEXATTN_HOST_DEVICE static constexpr int key_of_score(int i) { return 8 * (i / 4) + (i & 1); }
  static __device__ int key_of_lane() { return 2 * t(); }
  FLEXATTN_HOST_DEVICE static constexpr int channel_of_output(int i) { return 8 * (i / 4) + (i & 1); }
  static __device__ int channel_of_lane() { return 2 * t(); }

  template <typename Function>
  static __device__ float over_row(float x, const Function& combine) {
    x = combine(x, __shfl_xor_sync(kAllLanes, x, 1));
    return combine(x, __shfl_xor_sync(kAllLanes, x, 2));
  }
  static __device__ bool first_of_row() { return t() == 0; }

  uint32_t query[kD / 16][4];

  template <typename Row>
  __device__ void load_query(const Row& row, int d) {
    const Element* from[2] = {row(g()), row(g() + 8)};
#pragma unroll
    for (int c = 0; c < kD / 16; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * c + 8 * (i / 2) + 2 * t();
        query[c][i] = channel < d ? *reinterpret_cast<const uint32_t*>(from[i % 2] + channel) : 0;
      }
  }

  static __device__ int first_of_keys() {
    const int matrix = lane() / 8, row = 8 * (matrix / 2) + lane() % 8;
    return row * kRowChunks + key_chunk(row, matrix % 2);
  }
  static __device__ int first_of_values() {
    const int matrix = lane() / 8, row = 8 * (matrix % 2) + lane() % 8;
    return row * kRowChunks + value_chunk(row, matrix / 2);
  }

  template <int part, int n>
  __device__ void multiply_keys(float (&s)[n], const Element* keys, int first) const {
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) multiply_channels(s, query[c], keys, first, c);
  }

  template <int n>
  static __device__ void multiply_rows(float (&s)[n], const Element* a, const Element* b) {
    const int matrix = lane() / 8, row = 8 * (matrix % 2) + lane() % 8;
    const int of_a = opaque(row * kRowChunks + key_chunk(row, matrix / 2)), of_b = first_of_keys();
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      uint32_t x[4];
      ldmatrix_x4(x, a + 8 * chunk_from(of_a, 2 * c));
      multiply_channels(s, x, b, of_b, c);
    }
  }

  struct Weights {};
  template <int part>
  __device__ void multiply_values(float (&o)[kOutputs], const float (&p)[kScores], Weights&, const Element* values,
                                  int first) const {
    multiply_weights(o, p, values, first);
  }

  template <int n>
  static __device__ void multiply_weights(float (&o)[kOutputs], const float (&p)[n], const Element* values) {
    multiply_weights(o, p, values, first_of_values());
  }

 private:
  template <int n>
  static __device__ void multiply_weights(float (&o)[kOutputs], const float (&p)[n], const Element* values, int first) {
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = pack(p[8 * j + 2 * i], p[8 * j + 2 * i + 1]);
#pragma unroll
      for (int c = 0; c < kD / 16; ++c) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, values + 8 * (16 * j * kRowChunks + chunk_from(first, 2 * c)));
        mma_m16n8k16<T>(four(o, 2 * c), a, {v[0], v[1]});
        mma_m16n8k16<T>(four(o, 2 * c + 1), a, {v[2], v[3]});
      }
    }
  }

  // Where the chunk c further than the one at `first` lies. Layouts permute 8 chunks, so that an address takes a higher
  // bit as its offset.
  static __device__ int chunk_from(int first, int c) { return (first ^ (c & 7)) + (c & 8); }

  // s += a b over the channels 16 c .. 16 c + 15.
  template <int n>
  static __device__ __forceinline__ void multiply_channels(float (&s)[n], const uint32_t (&a)[4], const Element* b,
                                                           int first, int c) {
    const Element* chunk = b + 8 * chunk_from(first, 2 * c);
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
      uint32_t k[4];
      ldmatrix_x4(k, chunk + 8 * 16 * kRowChunks * j);
      mma_m16n8k16<T>(four(s, 2 * j), a, {k[0], k[1]});
      mma_m16n8k16<T>(four(s, 2 * j + 1), a, {k[2], k[3]});
    }
  }

  template <int n>
  static __device__ float (&four(float (&x)[n], int j))[4] {
    return *reinterpret_cast<float (*)[4]>(x + 4 * j);
  }
  static __device__ uint32_t pack(float low, float high) {
    const T both[2] = {narrow<T>(low), narrow<T>(high)};
    return *reinterpret_cast<const uint32_t*>(both);
  }
};

}  // namespace flexattn::cuda
