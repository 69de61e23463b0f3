// Products of 64 x 64 tiles in float32 without tensor cores: a lane multiplies 8 x 4 values at a time from registers,
// which it loads from shared memory 16 bytes at a time.
//
// Both operands pass through shared memory as float32, in slices of 8 KB: 16 channels of 64 rows and of 64 keys for
// scores, or a few whole rows of values. There are two buffers: while one is multiplied, the next slice is on its way
// in registers, and one barrier per slice is enough. A slice fits any head size, so that two blocks fit a
// multiprocessor.
#pragma once

#include "attention_tiles.cuh"
#include "vector.cuh"

namespace flexattn::cuda {

// Which lane holds what of a warp's 16 rows. kD: channels, a multiple of 64.
//
//   lane = 16 h + l                          l: 0..15
//   scores[4 i + j]           row 2 i + h, key 4 l + j of 64                   i: 0..7, j: 0..3
//   outputs[32 g + 4 i + j]   row 2 i + h, channel 64 g + 4 l + j
template <typename T, int kD>
struct FmaRows {
  using Element = T;
  static constexpr int kLaneRows = 8, kNeighbours = 4;  // see row_steps.cuh
  static constexpr int kScores = kLaneRows * 4, kOutputs = kLaneRows * kD / 16;

  static __device__ int l() { return lane() & 15; }
  static __device__ int h() { return lane() >> 4; }

  FLEXATTN_HOST_DEVICE static constexpr int row_of(int i) { return i / 4 % kLaneRows; }
  static __device__ int row(int which) { return 2 * which + h(); }
  FLEXATTN_HOST_DEVICE static constexpr int key_of_score(int i) { return i % 4; }
  static __device__ int key_of_lane() { return 4 * l(); }
  FLEXATTN_HOST_DEVICE static constexpr int channel_of_output(int i) { return 64 * (i / 32) + i % 4; }
  static __device__ int channel_of_lane() { return 4 * l(); }

  // The 16 lanes that hold one row.
  template <typename Function>
  static __device__ float over_row(float x, const Function& combine) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
  }
  static __device__ bool first_of_row() { return l() == 0; }
};

// ------------------------------------------------------------------------------------------------ slices on their way

constexpr int kSliceFloats = 2048, kSliceChannels = 16;
constexpr int kSliceVectors = kSliceFloats / (4 * kTileThreads);  // of four channels, per thread
using Floats = Vector<float, 4>;

// Slices pass through two buffers. A thread carries vectors thread, thread + 128, ... of the next one.
template <typename T>
struct SliceStream {
  float* buffers;
  int current = 0;  // where the current slice begins
  Vector<T, 4> held[kSliceVectors];

  // Make what is held the current slice, with the first of the thread's vectors at number `first`. The whole block.
  __device__ __forceinline__ const float* turn(int first) {
    current ^= kSliceFloats;
#pragma unroll
    for (int i = 0; i < kSliceVectors; ++i) {
      Floats wide;
#pragma unroll
      for (int c = 0; c < 4; ++c) wide.element[c] = widen(held[i].element[c]);
      store(buffers + current + 4 * (first + i * kTileThreads), wide);
    }
    __syncthreads();  // the slice is complete, and the one before it is no longer read
    return buffers + current;
  }
};

// Slices for scores: 16 channels of the 64 rows of the block, then of the 64 keys of a tile, a row of four vectors
// each. Keys lie in the order in which the lanes read them: key 4 l + j in row 16 j + l.
template <typename T>
struct ScoreSlices {
  static constexpr int kRowVectors = kSliceChannels / 4, kStep = kTileThreads / kRowVectors;
  static_assert(kTileRows == 2 * kStep && kTileKeys == 2 * kStep, "of a thread's vectors, two belong to each");
  using RowPointers = const T* [2][kTileThreads];
  RowPointers& rows;  // of each thread's first two vectors, in shared memory since registers are scarce
  const T* keys[2];   // of the other two

  static __device__ int channel_of_thread() { return 4 * (threadIdx.x % kRowVectors); }
  // Vectors are permuted within their row, so that 8 lanes write or read 8 different 16-byte groups of banks.
  static __device__ int vector(int row, int v) { return kRowVectors * row + (v ^ (row >> 1 & 3)); }
  static __device__ int first_vector() { return vector(threadIdx.x / kRowVectors, threadIdx.x % kRowVectors); }

  __device__ __forceinline__ void set_rows(const TileRows<T>& of_block) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows[i][threadIdx.x] = of_block.row(threadIdx.x / kRowVectors + i * kStep) + channel_of_thread();
  }
  __device__ __forceinline__ void set_keys(const TileRows<T>& of_tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = threadIdx.x / kRowVectors + i * kStep;
      keys[i] = of_tile.row(4 * (at % 16) + at / 16) + channel_of_thread();
    }
  }

  // Start loading the slice from a channel on; channels from d on are zero.
  __device__ __forceinline__ void issue(SliceStream<T>& stream, int channel, int d) const {
    const bool exists = channel + channel_of_thread() < d;
#pragma unroll
    for (int i = 0; i < kSliceVectors; ++i) {
      const T* row = i < 2 ? rows[i][threadIdx.x] : keys[i - 2];
      stream.held[i] = exists ? load<4>(row + channel) : Vector<T, 4>{};
    }
  }

  // s += rows of the warp times keys, over the channels of a slice.
  template <int n>
  static __device__ __forceinline__ void multiply(float (&s)[n], const float* slice) {
    using Rows = FmaRows<T, 64>;
    const Floats* vectors = reinterpret_cast<const Floats*>(slice);
    const Floats* of_rows = vectors + kRowVectors * (warp_in_block() * kWarpRows + Rows::h());
    const Floats* of_keys = vectors + kRowVectors * (kTileRows + Rows::l());
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      Floats key[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) key[j] = of_keys[kRowVectors * 16 * j + (v ^ (Rows::l() >> 1 & 3))];
#pragma unroll
      for (int i = 0; i < Rows::kLaneRows; ++i) {
        const Floats row = of_rows[kRowVectors * 2 * i + (v ^ (i & 3))];
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
          for (int j = 0; j < 4; ++j) s[4 * i + j] += row.element[c] * key[j].element[c];
      }
    }
  }
};

// Weights on their way from the lanes that computed them to those of the whole row, [64 rows][64 keys] and padding that
// sends the two rows which a warp reads at a time to different banks.
constexpr int kWeightPitch = kTileKeys + 4, kWeightFloats = kTileRows * kWeightPitch;

// Of the lane's first row; the others follow in steps of two rows.
template <typename Rows>
__device__ float* weights_of_lane(float* weights) {
  return weights + block_row<Rows>(0) * kWeightPitch;
}

// Read by the lanes of the warp alone, after a barrier.
template <typename Rows>
__device__ __forceinline__ void store_weights(const float (&s)[Rows::kScores], float* weights) {
  float* to = weights_of_lane<Rows>(weights) + Rows::key_of_lane();
#pragma unroll
  for (int i = 0; i < Rows::kLaneRows; ++i)
    store(to + 2 * kWeightPitch * i, Floats{{s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]}});
}

// Slices of values: whole rows, one after the other.
template <typename T, int kD>
struct ValueSlices {
  static constexpr int kKeys = kSliceFloats / kD, kRowVectors = kD / 4;

  static __device__ int first_vector() { return threadIdx.x; }

  // Start loading the slice from a key of the tile on. seen: keys of the tile that some row of the block sees; others
  // become zero, since a weight of 0 does not hide a NaN.
  static __device__ __forceinline__ void issue(SliceStream<T>& stream, const TileRows<T>& rows, uint64_t seen,
                                               int first_key, int d) {
#pragma unroll
    for (int i = 0; i < kSliceVectors; ++i) {
      const int number = threadIdx.x + i * kTileThreads, key = first_key + number / kRowVectors,
                channel = 4 * (number % kRowVectors);
      stream.held[i] = channel < d && (seen >> key & 1) ? load<4>(rows.row(key) + channel) : Vector<T, 4>{};
    }
  }

  // out += weights times values, over the keys of a slice. weights: those of the lane's first row for these keys.
  static __device__ __forceinline__ void multiply(float (&out)[FmaRows<T, kD>::kOutputs], const float* weights,
                                                  const float* slice) {
    using Rows = FmaRows<T, kD>;
    const Floats* values = reinterpret_cast<const Floats*>(slice) + Rows::l();
#pragma unroll
    for (int four = 0; four < kKeys; four += 4) {
      Floats weight[Rows::kLaneRows];
#pragma unroll
      for (int i = 0; i < Rows::kLaneRows; ++i) weight[i] = load<4>(weights + 2 * kWeightPitch * i + four);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int g = 0; g < kD / 64; ++g) {
          const Floats value = values[(four + k) * kRowVectors + 16 * g];
#pragma unroll
          for (int i = 0; i < Rows::kLaneRows; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[32 * g + 4 * i + j] += weight[i].element[k] * value.element[j];
        }
    }
  }
};

// -------------------------------------------------------------------------------------------------- the products

// s += rows times keys. The first slice has been issued; issue_next starts what follows the last.
template <typename T, int n, typename Next>
__device__ __forceinline__ void multiply_keys(float (&s)[n], SliceStream<T>& stream, const ScoreSlices<T>& slices,
                                              int d, const Next& issue_next) {
  for (int channel = 0; channel < d; channel += kSliceChannels) {
    const float* slice = stream.turn(ScoreSlices<T>::first_vector());
    if (channel + kSliceChannels < d)
      slices.issue(stream, channel + kSliceChannels, d);
    else
      issue_next();
    ScoreSlices<T>::multiply(s, slice);
  }
}

// out += weights times values of the tile's keys, likewise. issue(key) starts the slice from a key on.
template <typename T, int kD, int n, typename Issue, typename Next>
__device__ __forceinline__ void multiply_values(float (&out)[n], float* weights, SliceStream<T>& stream, int keys,
                                                const Issue& issue, const Next& issue_next) {
  using Values = ValueSlices<T, kD>;
  for (int key = 0; key < keys; key += Values::kKeys) {
    const float* slice = stream.turn(Values::first_vector());
    if (key + Values::kKeys < keys)
      issue(key + Values::kKeys);
    else
      issue_next();
    Values::multiply(out, weights_of_lane<FmaRows<T, kD>>(weights) + key, slice);
  }
}

}  // namespace flexattn::cuda
