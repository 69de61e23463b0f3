// Tiles of the tensor-core kernel: which 64 keys come next, and their way from global to shared memory.
#pragma once

#include "ptx.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {

constexpr int kTileRows = 64, kTileKeys = 64, kTileThreads = 128;
constexpr int kWarpRows = kTileRows / (kTileThreads / kWarp);

// 64 consecutive keys: of the sequence, or of the sample's list of slots.
struct KeyTile {
  bool hr;
  int first, end;  // keys first .. first + 63, those from `end` on do not exist
};

// Where the rows of a tile lie. Rows that do not exist are read as the last one that does; their scores are masked.
template <typename T>
struct TileRows {
  const T* data;
  int64_t stride;
  const int32_t* slots;  // null: the sequence
  int first, last;

  __device__ const T* row(int r) const {
    const int at = min(first + r, last);
    return data + (slots ? slots[at] : at) * stride;
  }
};

// A tile on its way, in Mma::kParts parts: issue<part>() starts the loads, commit<part>() has them in shared memory.
// place(row, c): where chunk c of 16 bytes stands in its row.
template <typename Mma, int kD>
struct TileCopy {
  using T = typename Mma::Element;
  static constexpr int kChunks = kD / 8;  // that hold channels; a row has room for more
  static constexpr int kPerPart = kTileKeys * kChunks / kTileThreads / Mma::kParts;  // per thread
  static_assert(kPerPart * kTileThreads * Mma::kParts == kTileKeys * kChunks);
  uint4 held[Mma::kAsync ? 1 : kPerPart];

  // Shared memory serves 8 lanes at a time. Where these have parts of two rows, the rows differ in their low four bits,
  // so that Mma's permutations of chunks send the end of one row and the beginning of the other to different banks.
  static __device__ int row(int part, int i) {
    const int n = (threadIdx.x + (part * kPerPart + i) * kTileThreads) / kChunks;
    return kChunks % 8 ? n ^ (n & 1) * 14 : n;
  }
  static __device__ int chunk(int part, int i) {
    return (threadIdx.x + (part * kPerPart + i) * kTileThreads) % kChunks;
  }

  template <int part, typename Chunk>
  __device__ void issue(const TileRows<T>& rows, int d, T* shared, const Chunk& place) {
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) {
      const int r = row(part, i), c = chunk(part, i);
      const T* from = rows.row(r) + 8 * c;
      if constexpr (Mma::kAsync) {
        cp_async_16(shared + 8 * (r * Mma::kRowChunks + place(r, c)), 8 * c < d ? from : rows.data, 8 * c < d);
      } else {
        held[i] = 8 * c < d ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
      }
    }
    if constexpr (Mma::kAsync) cp_async_commit();
  }

  template <int part, typename Chunk>
  __device__ void commit(T* shared, const Chunk& place) const {
    if constexpr (Mma::kAsync) {
      if constexpr (part + 1 == Mma::kParts) cp_async_wait<0>();
    } else {
#pragma unroll
      for (int i = 0; i < kPerPart; ++i) {
        const int r = row(part, i), c = chunk(part, i);
        reinterpret_cast<uint4*>(shared)[r * Mma::kRowChunks + place(r, c)] = held[i];
      }
    }
  }
};

// function(std::integral_constant<int, i>()) for each i < n.
template <int n, int i = 0, typename Function>
__device__ __forceinline__ void unrolled(const Function& function) {
  if constexpr (i < n) {
    function(std::integral_constant<int, i>());
    unrolled<n, i + 1>(function);
  }
}

// Bits first .. first + 63 of a bit list of the given length; those past its end are 0.
__device__ inline uint64_t bits_from(const int32_t* words, int first, int64_t length) {
  const int64_t count = words_for_bits(length), word = first / kBitsPerWord;
  const int shift = first % kBitsPerWord;
  auto at = [&](int64_t i) -> uint64_t { return i < count ? static_cast<uint32_t>(words[i]) : 0; };
  const uint64_t both = at(word) | at(word + 1) << kBitsPerWord;
  return shift ? both >> shift | at(word + 2) << (2 * kBitsPerWord - shift) : both;
}

// The lowest n bits; all 64 from n = 64 on, none below n = 1.
__device__ inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1; }

}  // namespace flexattn::cuda
