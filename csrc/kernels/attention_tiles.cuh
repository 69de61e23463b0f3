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

// Where the rows of a tile lie. A row that does not exist is read as the last; its score is masked.
template <typename T>
struct TileRows {
  const T* data;
  int row_bytes;
  const int32_t* slots;  // or listed queries, -1 for none; null: the sequence
  int first, last;

  __device__ int position(int r) const { return min(first + r, last); }
  __device__ int listed(int at) const { return max(*row_in_global(slots, at, sizeof(int32_t)), 0); }
  __device__ int number(int r) const {
    const int at = position(r);
    return slots ? listed(at) : at;
  }
  __device__ const T* row(int r) const { return row_in_global(data, number(r), row_bytes); }
};

// attention_path.h refuses longer rows.
template <typename T>
__device__ int row_bytes(const Strides& strides) {
  return static_cast<int>(strides.row * static_cast<int64_t>(sizeof(T)));
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

// Channels from d on are never loaded, so they must be zero from the start. The whole block, before a barrier.
template <typename Mma, int kD, typename T>
__device__ void clear_rows(T* shared, int rows, int d) {
  if (d == kD) return;
  for (int i = threadIdx.x; i < rows * Mma::kRowChunks; i += blockDim.x) reinterpret_cast<uint4*>(shared)[i] = uint4{};
}

// A tile on its way, in kParts parts of which kAhead are in flight. find() its rows and start() loading; then
// advance<part>() after each part of other work puts that part into shared memory. kKept: where the thread's first
// chunk lies stays in registers, if the others follow from it; otherwise it is computed again for every tile.
template <typename Mma, int kD, int kRows = kTileKeys, int kThreads = kTileThreads, int kParts = Mma::kParts,
          bool kKept = false>
struct TileCopy {
  using T = typename Mma::Element;
  static constexpr unsigned kChunks = kD / 8;  // of a row, which may have room for more
  static constexpr int kPerPart = static_cast<int>(blocks_for(kRows * kChunks, kParts* kThreads));  // per thread
  static constexpr bool kFull = kPerPart * kThreads * kParts == kRows * kChunks;  // every thread has a chunk every time
  static constexpr bool kColumn = kThreads % kChunks == 0;  // the chunks of a thread have one number in their rows
  static constexpr int kStep = kThreads / kChunks;          // and their rows this distance
  static constexpr int kAhead = kParts > 1 ? 2 : 1;
  static constexpr bool kKeepsFirst = kKept && kColumn && Mma::kOneLayout;
  int numbers[kParts * kPerPart];  // of the rows of the thread's chunks
  uint4 held[Mma::kAsync ? 1 : kAhead * kPerPart];
  int first_row, first_channel, first_place;  // if kKeepsFirst

  __device__ TileCopy() {
    if (!kKeepsFirst) return;
    const int row = thread() / kChunks;
    first_row = opaque(row);
    first_channel = opaque(8 * chunk(0));
    first_place = opaque(row * Mma::kRowChunks + KeyLayout<Mma>::chunk(row, chunk(0)));
  }

  // The chunks are numbered row by row.
  static __device__ unsigned thread() { return !Mma::kAsync && kParts == 1 ? opaque(threadIdx.x) : threadIdx.x; }
  static __device__ bool exists(unsigned i) { return kFull || thread() + i * kThreads < kRows * kChunks; }
  // Shared memory serves 8 lanes at a time. If these hold chunks of two rows, the rows differ in their low four bits,
  // so that Mma's permutations of chunks send the end of one row and the start of the other to different banks.
  __device__ int row(unsigned i) const {
    if (kKeepsFirst) return first_row + i * kStep;
    if (kColumn) return thread() / kChunks + i * kStep;
    const unsigned n = (thread() + i * kThreads) / kChunks;
    return kChunks % 8 ? n ^ (n & 1) * 14 : n;
  }
  static __device__ int chunk(unsigned i) { return (thread() + (kColumn ? 0 : i * kThreads)) % kChunks; }
  __device__ int channel(unsigned i) const { return kKeepsFirst ? first_channel : 8 * chunk(i); }
  // Where chunk i lies in shared memory. Layouts permute by bits of the row, and a step changes other bits than those
  // of row(0).
  template <typename Layout>
  __device__ int place(int i) const {
    if (!kColumn) return row(i) * Mma::kRowChunks + Layout::chunk(row(i), chunk(i));
    const int first = kKeepsFirst ? first_place : row(0) * Mma::kRowChunks + Layout::chunk(row(0), chunk(0));
    return (first ^ Layout::chunk(i * kStep, 0)) + i * kStep * Mma::kRowChunks;
  }

  __device__ void find(const TileRows<T>& rows) {
#pragma unroll
    for (int i = 0; i < kParts * kPerPart; ++i)
      if (exists(i)) numbers[i] = rows.position(row(i));
    if (!rows.slots) return;  // one branch for all of them
#pragma unroll
    for (int i = 0; i < kParts * kPerPart; ++i)
      if (exists(i)) numbers[i] = rows.listed(numbers[i]);
  }

  __device__ void take(const TileCopy& other) {
#pragma unroll
    for (int i = 0; i < kParts * kPerPart; ++i) numbers[i] = other.numbers[i];
  }

  template <typename Layout>
  __device__ void start(const TileRows<T>& rows, int d, T* shared) {
    unrolled<kAhead>([&](auto part) { issue<Layout, part.value>(rows, d, shared); });
  }

  template <typename Layout, int part>
  __device__ void advance(const TileRows<T>& rows, int d, T* shared) {
    commit<Layout, part>(d, shared);
    if constexpr (part + kAhead < kParts) issue<Layout, part + kAhead>(rows, d, shared);
  }

  template <typename Layout>
  __device__ void load(const TileRows<T>& rows, int d, T* shared) {
    find(rows);
    start<Layout>(rows, d, shared);
    unrolled<kParts>([&](auto part) { advance<Layout, part.value>(rows, d, shared); });
  }

  template <typename Layout, int part>
  __device__ void issue(const TileRows<T>& rows, int d, T* shared) {
#pragma unroll
    for (int i = part * kPerPart; i < (part + 1) * kPerPart; ++i) {
      if (!exists(i) || channel(i) >= d) continue;
      const T* from = row_in_global(rows.data + channel(i), numbers[i], rows.row_bytes);
      if constexpr (Mma::kAsync)
        cp_async_16(shared + 8 * place<Layout>(i), from);
      else
        held[i % (kAhead * kPerPart)] = *reinterpret_cast<const uint4*>(from);
    }
    if constexpr (Mma::kAsync) cp_async_commit();
  }

  template <typename Layout, int part>
  __device__ void commit(int d, T* shared) const {
    if constexpr (Mma::kAsync) {
      if constexpr (part + 1 == kParts) cp_async_wait<0>();
    } else {
#pragma unroll
      for (int i = part * kPerPart; i < (part + 1) * kPerPart; ++i)
        if (exists(i) && channel(i) < d)
          reinterpret_cast<uint4*>(shared)[place<Layout>(i)] = held[i % (kAhead * kPerPart)];
    }
  }
};

// s += q k over all channels.
template <typename Mma, int n, typename T>
__device__ __forceinline__ void multiply_all_keys(const Mma& mma, float (&s)[n], const T* keys) {
  const int first = Mma::first_of_keys();
  unrolled<Mma::kParts>([&](auto part) { mma.template multiply_keys<part.value>(s, keys, first); });
}

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
  // Start loading the next rows: of two tensors, the same of both, or others of one.
  __device__ void issue_same(const TileRows<T>& first, const TileRows<T>& second, int d) {
    copies[0].find(first);
    copies[1].take(copies[0]);
    start(first, second, d);
  }
  __device__ void issue_others(const TileRows<T>& first, const TileRows<T>& second, int d) {
    copies[0].find(first);
    copies[1].find(second);
    start(first, second, d);
  }
  __device__ void start(const TileRows<T>& first, const TileRows<T>& second, int d) {
    copies[0].template start<Layout>(first, d, rows(0, 1));
    copies[1].template start<Layout>(second, d, rows(1, 1));
  }
  // Make them the current rows. The whole block; a barrier must follow.
  __device__ void commit(int d) {
    if (!Mma::kAsync) __syncthreads();  // the current rows are no longer read
    copies[0].template commit<Layout, 0>(d, rows(0, 1));
    copies[1].template commit<Layout, 0>(d, rows(1, 1));
    current = (current + 1) % kPassingBuffers<Mma>;
  }
};

// Load the rows that a block owns.
template <typename Mma, int kD, int kRows, int kThreads, typename T>
__device__ void load_own_rows(const TileRows<T>& rows, int d, T* shared) {
  TileCopy<Mma, kD, kRows, kThreads, 4>().template load<KeyLayout<Mma>>(rows, d, shared);
}

// The 16 rows of the warp among those that the block owns.
template <typename Mma, typename T>
__device__ const T* rows_of_warp(const T* own) {
  return own + 8 * kWarpRows * warp_in_block() * Mma::kRowChunks;
}

}  // namespace flexattn::cuda
