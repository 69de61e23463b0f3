// Tiles of keys, values or queries: where their rows lie, which all kernels in tiles share; and, for tensor cores,
// their way from global to shared memory.
#pragma once

#include "ptx.cuh"
#include "softmax.cuh"
#include "unroll.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {

constexpr int kTileRows = 64, kTileKeys = 64, kTileThreads = 128;
constexpr int kWarpRows = kTileRows / (kTileThreads / kWarp);

// 64 consecutive keys, of the sequence or of the sample's list of slots.
struct KeyTile {
  bool hr;
  int first, end;  // keys first .. first + 63; those from `end` on do not exist
};

// Where the rows of a tile lie. A row that does not exist is read as another; its score is masked.
template <typename T>
struct TileRows {
  const T* data;
  int64_t stride;
  const int32_t* slots;  // or listed queries, -1 for none; null: the sequence
  int first, last;

  __device__ const T* row(int r) const {
    const int at = min(first + r, last);
    return data + (slots ? max(slots[at], 0) : at) * stride;
  }
};

// Rows of one kv_head of sample b: of `sequence`, or of `pool` for a tile of HR keys.
template <typename T>
__device__ TileRows<T> tile_rows(const AttentionInputs& in, const KeyTile& tile, int b, int kv_head,
                                 const void* sequence, const Strides& strides, const void* pool,
                                 const Strides& pool_strides) {
  if (tile.hr)
    return {row_of<T>(pool, pool_strides, 0, kv_head, 0), pool_strides.row,
            in.hr_slots + static_cast<int64_t>(b) * in.selected, tile.first, tile.end - 1};
  return {row_of<T>(sequence, strides, b, kv_head, 0), strides.row, nullptr, tile.first, tile.end - 1};
}
template <typename T>
__device__ TileRows<T> key_rows(const AttentionInputs& in, const KeyTile& tile, int b, int kv_head) {
  return tile_rows<T>(in, tile, b, kv_head, in.k, in.k_strides, in.k_hr, in.k_hr_strides);
}
template <typename T>
__device__ TileRows<T> value_rows(const AttentionInputs& in, const KeyTile& tile, int b, int kv_head) {
  return tile_rows<T>(in, tile, b, kv_head, in.v, in.v_strides, in.v_hr, in.v_hr_strides);
}

// Where a tile lies in shared memory: position of 16-byte chunk c within its row.
template <typename Mma>
struct KeyLayout {
  static __device__ int chunk(int row, int c) { return Mma::key_chunk(row, c); }
};
template <typename Mma>
struct ValueLayout {
  static __device__ int chunk(int row, int c) { return Mma::value_chunk(row, c); }
};
template <typename Mma>
constexpr int kTileElements = 8 * kTileKeys * Mma::kRowChunks;

// A tile on its way, in kParts parts: issue<part>() starts loading, commit<part>() puts it into shared memory.
template <typename Mma, int kD, int kRows = kTileKeys, int kThreads = kTileThreads, int kParts = Mma::kParts>
struct TileCopy {
  using T = typename Mma::Element;
  static constexpr int kChunks = kD / 8;  // of a row, which may have room for more
  static constexpr int kPerPart = static_cast<int>(blocks_for(kRows * kChunks, kParts* kThreads));  // per thread
  static constexpr bool kFull = kPerPart * kThreads * kParts == kRows * kChunks;  // every thread has a chunk every time
  uint4 held[Mma::kAsync ? 1 : kPerPart];

  // The chunks are numbered row by row.
  static __device__ int number(int part, int i) {
    const int thread = !Mma::kAsync && kParts == 1 ? opaque(threadIdx.x) : threadIdx.x;
    return thread + (part * kPerPart + i) * kThreads;
  }
  static __device__ bool exists(int part, int i) { return kFull || number(part, i) < kRows * kChunks; }
  // Shared memory serves 8 lanes at a time. If these hold chunks of two rows, the rows differ in their low four bits,
  // so that Mma's permutations of chunks send the end of one row and the start of the other to different banks.
  static __device__ int row(int part, int i) {
    const int n = number(part, i) / kChunks;
    return kChunks % 8 ? n ^ (n & 1) * 14 : n;
  }
  static __device__ int chunk(int part, int i) { return number(part, i) % kChunks; }

  template <typename Layout, int part>
  __device__ void issue(const TileRows<T>& rows, int d, T* shared) {
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) {
      if (!exists(part, i)) continue;
      const int r = row(part, i), c = chunk(part, i);
      const T* from = rows.row(r) + 8 * c;
      if constexpr (Mma::kAsync) {
        cp_async_16(shared + 8 * (r * Mma::kRowChunks + Layout::chunk(r, c)), 8 * c < d ? from : rows.data, 8 * c < d);
      } else {
        held[i] = 8 * c < d ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
      }
    }
    if constexpr (Mma::kAsync) cp_async_commit();
  }

  // Call after part `part` of other work: that part is stored, and the loads of the next one start.
  template <typename Layout, int part>
  __device__ void advance(const TileRows<T>& rows, int d, T* shared) {
    commit<Layout, part>(shared);
    if constexpr (part + 1 < kParts) issue<Layout, part + 1>(rows, d, shared);
  }

  template <typename Layout, int part>
  __device__ void commit(T* shared) const {
    if constexpr (Mma::kAsync) {
      if constexpr (part + 1 == kParts) cp_async_wait<0>();
    } else {
#pragma unroll
      for (int i = 0; i < kPerPart; ++i) {
        if (!exists(part, i)) continue;
        const int r = row(part, i), c = chunk(part, i);
        reinterpret_cast<uint4*>(shared)[r * Mma::kRowChunks + Layout::chunk(r, c)] = held[i];
      }
    }
  }
};

// Cap scores, which `scale` turns into logits in base 2. 1 - 2 / (1 + e^2x) is tanh(x), with an absolute error that
// float16 hides.
template <int n>
__device__ __forceinline__ void cap_scores(const AttentionInputs& in, float (&s)[n], float scale) {
  if (!(in.softcap > 0)) return;
  const float softcap = __fdividef(static_cast<float>(in.softcap * kLog2e), scale);
  const float factor = __fdividef(static_cast<float>(2 * kLog2e), softcap);
#pragma unroll
  for (int i = 0; i < n; ++i) s[i] = softcap - __fdividef(2.f * softcap, 1.f + exp2_approx(factor * s[i]));
}

// A lane holds parts of two rows. Which row of the block is its row `which` (0 or 1).
template <typename Mma>
__device__ int block_row(int which) {
  return warp_in_block() * kWarpRows + Mma::row(which);
}

constexpr int kPassingRows = 32;
constexpr int kPassingScores = kPassingRows / 2;  // of a lane

// Rows on their way through a buffer, or through one of two if cp.async fills it while the other is read.
template <typename Mma>
constexpr int kPassingBuffers = Mma::kAsync ? 2 : 1;
template <typename Mma>
constexpr int kPassingElements = 8 * kPassingRows * Mma::kRowChunks;

template <typename Mma, int kD, int kThreads>
struct PassingRows {
  using T = typename Mma::Element;
  using Layout = KeyLayout<Mma>;
  TileCopy<Mma, kD, kPassingRows, kThreads, 1> copies[2];
  T* buffers;  // of both tensors, kPassingBuffers times
  int current = 0;

  __device__ T* rows(int tensor, int ahead = 0) const {
    const int buffer = (current + ahead) % kPassingBuffers<Mma>;
    return buffers + (2 * buffer + tensor) * kPassingElements<Mma>;
  }
  // Start loading the next rows of both tensors.
  __device__ void issue(const TileRows<T>& first, const TileRows<T>& second, int d) {
    copies[0].template issue<Layout, 0>(first, d, rows(0, 1));
    copies[1].template issue<Layout, 0>(second, d, rows(1, 1));
  }
  // Make them the current rows. The whole block; a barrier must follow.
  __device__ void commit() {
    if (!Mma::kAsync) __syncthreads();  // the current rows are no longer read
    copies[0].template commit<Layout, 0>(rows(0, 1));
    copies[1].template commit<Layout, 0>(rows(1, 1));
    current = (current + 1) % kPassingBuffers<Mma>;
  }
};

// Load the rows that a block owns.
template <typename Mma, int kD, int kRows, int kThreads, typename T>
__device__ void load_own_rows(const TileRows<T>& rows, int d, T* shared) {
  constexpr int kParts = 4;
  TileCopy<Mma, kD, kRows, kThreads, kParts> copy;
  copy.template issue<KeyLayout<Mma>, 0>(rows, d, shared);
  unrolled<kParts>([&](auto part) { copy.template advance<KeyLayout<Mma>, part.value>(rows, d, shared); });
}

// The 16 rows of the warp among those that the block owns.
template <typename Mma, typename T>
__device__ const T* rows_of_warp(const T* own) {
  return own + 8 * kWarpRows * warp_in_block() * Mma::kRowChunks;
}

}  // namespace flexattn::cuda
