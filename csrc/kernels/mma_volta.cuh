// Tensor cores of Volta: mma.m8n8k4, and which lane holds what of a warp's 16 query rows.
//
// One instruction is four products of 8 x 8 x 4, one per quad-pair of lanes. A quad-pair is (pr, pc): it multiplies the
// rows 8 pr .. 8 pr + 7 with the columns 8 pc .. 8 pc + 7, so that together they are 16 x 16 x 4. A lane is
//
//     lane = 16 h + 8 pr + 4 pc + l        l: 0..3
//
//   a (row-major)     row 8 pr + 4 h + l, 4 consecutive k
//   b (column-major)  column 8 pc + 4 h + l, 4 consecutive k             the keys: a row of K is a column of b
//   b (row-major)     row l, columns 8 pc + 4 h .. + 3                   the values
//   d[i]              row 8 pr + 4 h + (i & 2) + (l & 1), column 8 pc + (i & 4) + (l & 2) + (i & 1)
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace flexattn::cuda {

// kD: channels, a multiple of 32. A warp has 16 query rows and sees 64 keys at a time; a lane holds parts of two rows.
template <int kD>
struct VoltaMma {
  using Element = __half;
  static constexpr int kScores = 32, kOutputs = kD / 2;
  static constexpr int kLaneRows = 2, kNeighbours = 2;  // see row_steps.cuh
  static constexpr int kRowChunks = kD <= 64 ? 8 : 16;  // 16-byte chunks of a row in shared memory
  static constexpr bool kAsync = false;                 // tiles pass through registers
  static constexpr int kParts = kD / 32;                // in parts

  // Chunks are permuted within their row, so that the 8 lanes that shared memory serves at a time read 8 different
  // 16-byte groups of banks: for the keys these are 8 rows (0-3 and 8-11, or 4-7 and 12-15) of one chunk, for the
  // values 4 rows (l) of two neighbouring chunks (pc).
  static constexpr bool kOneLayout = false;
  static __device__ int key_chunk(int row, int chunk) { return chunk ^ ((row & 3) | ((row >> 1) & 4)); }
  static __device__ int value_chunk(int row, int chunk) { return chunk ^ ((row & 3) << 1); }

  static __device__ int l() { return lane() & 3; }
  static __device__ int pc() { return (lane() >> 2) & 1; }
  static __device__ int pr() { return (lane() >> 3) & 1; }
  static __device__ int h() { return lane() >> 4; }

  // Of score i and output i: which of the lane's two rows; then the part of the key or channel that depends on i, and
  // the part that depends on the lane (their sum counts).
  FLEXATTN_HOST_DEVICE static constexpr int row_of(int i) { return (i >> 1) & 1; }
  static __device__ int row(int which) { return 8 * pr() + 4 * h() + 2 * which + (l() & 1); }
  FLEXATTN_HOST_DEVICE static constexpr int key_of_score(int i) { return 16 * (i / 8) + (i & 4) + (i & 1); }
  static __device__ int key_of_lane() { return 8 * pc() + (l() & 2); }
  // Outputs 16 j .. 16 j + 15 belong to the chunks 4 j .. 4 j + 3; one load of a chunk serves two products, the first
  // with its lower four channels, the second with the upper four.
  FLEXATTN_HOST_DEVICE static constexpr int channel_of_output(int i) {
    return 32 * (i / 16) + 4 * (i / 8 % 2) + 16 * (i / 4 % 2) + (i & 1);
  }
  static __device__ int channel_of_lane() { return 8 * pc() + (l() & 2); }

  // The four lanes that hold one row.
  template <typename Function>
  static __device__ float over_row(float x, const Function& combine) {
    x = combine(x, __shfl_xor_sync(kAllLanes, x, 2));
    return combine(x, __shfl_xor_sync(kAllLanes, x, 4));
  }
  static __device__ bool first_of_row() { return (lane() & 6) == 0; }

  uint32_t query[kD / 2];  // the whole row 8 pr + 4 h + l

  // row(n): the channels of the warp's query n; those from d on are zero.
  template <typename Row>
  __device__ void load_query(const Row& row, int d) {
    const Element* from = row(8 * pr() + 4 * h() + l());
#pragma unroll
    for (int c = 0; c < kD / 8; ++c) {
      const uint4 chunk = 8 * c < d ? *reinterpret_cast<const uint4*>(from + 8 * c) : uint4{0, 0, 0, 0};
      query[4 * c] = chunk.x, query[4 * c + 1] = chunk.y, query[4 * c + 2] = chunk.z, query[4 * c + 3] = chunk.w;
    }
  }

  // Where the lane's first chunks of keys and of values lie; computed where it is asked for, as registers are scarce.
  static __device__ int first_of_keys() { return opaque(first_chunk(8 * pc() + 4 * h() + l())); }
  template <bool kKeyLayout = false>
  static __device__ int first_of_values() {
    const int row = 8 * pc() + l(), chunk = 2 * h() + pc();
    return opaque(row * kRowChunks + (kKeyLayout ? key_chunk(row, chunk) : value_chunk(row, chunk)));
  }

  // s += q k over a part of the channels, for 2 n keys.
  template <int part, int n>
  __device__ void multiply_keys(float (&s)[n], const Element* keys, int first) const {
#pragma unroll
    for (int c = part * kD / 8 / kParts; c < (part + 1) * kD / 8 / kParts; ++c)
      multiply_chunk(s, {query[4 * c], query[4 * c + 1], query[4 * c + 2], query[4 * c + 3]},
                     reinterpret_cast<const uint4*>(keys) + chunk_from(first, c));
  }

  // s += a b for 16 rows a and 2 n rows b in shared memory, both in the layout of keys.
  template <int n>
  static __device__ void multiply_rows(float (&s)[n], const Element* a, const Element* b) {
    const int of_a = opaque(first_chunk(8 * pr() + 4 * h() + l())), of_b = first_of_keys();
#pragma unroll 4  // all of them would hold too many chunks in registers
    for (int c = 0; c < kD / 8; ++c)
      multiply_chunk(s, reinterpret_cast<const uint4*>(a)[chunk_from(of_a, c)],
                     reinterpret_cast<const uint4*>(b) + chunk_from(of_b, c));
  }

  // Weights of 16 keys: [keys of this pc, of the other][4 keys each][2 keys each] of row 8 pr + 4 h + l.
  struct Weights {
    uint32_t of[2][2][2];
  };

  // o += p v over a part of the keys. weights: left by the part before.
  template <int part>
  __device__ void multiply_values(float (&o)[kOutputs], const float (&p)[kScores], Weights& weights,
                                  const Element* values, int first) const {
    constexpr int kSteps = kScores / 2;
#pragma unroll
    for (int step = part * kSteps / kParts; step < (part + 1) * kSteps / kParts; ++step) {
      if (step % 4 == 0) weights = weights_of(p, step / 4);
      multiply_step<false>(o, weights, step, values, first);
    }
  }

  // o += p v over 2 n rows v in the layout of keys.
  template <int n>
  static __device__ void multiply_weights(float (&o)[kOutputs], const float (&p)[n], const Element* v) {
    const int first = first_of_values<true>();
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
      const Weights weights = weights_of(p, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply_step<true>(o, weights, 4 * j + i, v, first);
    }
  }

 private:
  // Where chunk 0 of a row of keys lies.
  static __device__ int first_chunk(int row) { return row * kRowChunks + key_chunk(row, 0); }
  // Where the chunk c further lies. Layouts permute 8 chunks, so that an address takes a higher bit as its offset.
  static __device__ int chunk_from(int first, int c) { return (first ^ (c & 7)) + (c & 8); }

  // s += a b over 8 channels. a: those of row 8 pr + 4 h + l; b: where those of row 8 pc + 4 h + l lie.
  template <int n>
  static __device__ __forceinline__ void multiply_chunk(float (&s)[n], uint4 a, const uint4* b) {
    uint4 k[n / 8];
#pragma unroll
    for (int j = 0; j < n / 8; ++j) k[j] = b[16 * kRowChunks * j];
#pragma unroll
    for (int j = 0; j < n / 8; ++j) mma_m8n8k4(eight(s, j), {a.x, a.y}, {k[j].x, k[j].y});
#pragma unroll
    for (int j = 0; j < n / 8; ++j) mma_m8n8k4(eight(s, j), {a.z, a.w}, {k[j].z, k[j].w});
  }

  // Of the keys 16 j .. 16 j + 15.
  template <int n>
  static __device__ __forceinline__ Weights weights_of(const float (&p)[n], int j) {
    Weights weights;
    auto& mine = weights.of[0];
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      // Lanes l and l ^ 2 hold two columns each of two rows; they swap so that each has four columns of one row.
      const uint32_t upper = pack(p[8 * j + 4 * four], p[8 * j + 4 * four + 1]);
      const uint32_t lower = pack(p[8 * j + 4 * four + 2], p[8 * j + 4 * four + 3]);
      const bool second = l() & 2;
      const uint32_t kept = second ? lower : upper, given = second ? upper : lower;
      const uint32_t got = __shfl_xor_sync(kAllLanes, given, 2);
      mine[four][0] = second ? got : kept;
      mine[four][1] = second ? kept : got;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) weights.of[1][i / 2][i % 2] = __shfl_xor_sync(kAllLanes, mine[i / 2][i % 2], 4);
    return weights;
  }

  // o += p v over 4 of every 8 keys 16 j .. 16 j + 15, j = step / 4. The two quad-pairs of a row take them in different
  // order: each begins with those it has. first: that of the lane's values.
  template <bool kKeyLayout>
  static __device__ __forceinline__ void multiply_step(float (&o)[kOutputs], const Weights& weights, int step,
                                                       const Element* values, int first) {
    // The other 8 rows differ in one bit of the row and, in the layout of keys, in one of where its chunks lie.
    constexpr int kOtherRows = 8 * kRowChunks + (kKeyLayout ? 4 : 0);
    const int other = step / 2 % 2, four = step % 2;
    const uint4* rows = reinterpret_cast<const uint4*>(values) + (step / 4 * 16 + 4 * four) * kRowChunks;
    const uint32_t (&a)[2] = weights.of[other][four];
    uint4 v[kD / 32];
#pragma unroll
    for (int c = 0; c < kD / 32; ++c) v[c] = rows[chunk_from(first ^ other * kOtherRows, 4 * c)];
#pragma unroll
    for (int c = 0; c < kD / 32; ++c) {
      mma_m8n8k4_row_row(eight(o, 2 * c), a, {v[c].x, v[c].y});
      mma_m8n8k4_row_row(eight(o, 2 * c + 1), a, {v[c].z, v[c].w});
    }
  }

  template <int n>
  static __device__ float (&eight(float (&x)[n], int j))[8] {
    return *reinterpret_cast<float (*)[8]>(x + 8 * j);
  }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
};

}  // namespace flexattn::cuda
