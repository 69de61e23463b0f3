// What a block of the kernels in tiles has to do: its query rows, and which tiles of keys they see.
#pragma once

#include <climits>
#include <type_traits>

#include "attention_tiles.cuh"
#include "device.cuh"
#include "flexattn/block_order.h"

namespace flexattn::cuda {

// Where the keys and values of one kind lie that a block streams: those of its sample and head.
struct alignas(16) KeySource {
  const void *keys, *values;
  const int32_t* slots;  // null: the sequence
  int key_row_bytes, value_row_bytes;
};

// Which keys of one kind a block streams. Tile 0 of the block begins with key `first`.
struct alignas(16) KeySpan {
  int first, end;
  KeyInterval common;  // the keys that every row is known to see, if there are any
};

// Lives in shared memory: registers are scarcest in this kernel.
struct BlockWork {
  KeySource sources[2];  // of the sequence; of HR keys
  KeySpan spans[2];
  int sample, head, kv_head;
  int first_row, rows;                 // queries first_row .. first_row + rows - 1
  int hr_count;                        // HR keys; 0 if no row of the block sees them
  int hr_from;                         // rows from here on see HR keys, unless rows are listed in hr_rows
  float alpha;                         // of the rows that see HR keys
  int sequence_tiles, tiles;           // tiles of the sequence; of sequence and HR keys
  int first_hr_tile;                   // sequence_tiles, or INT_MAX without HR keys
  int hr_row[kTileRows];               // of each row: its index in hr_rows, or -1
  KeyInterval keys_of_row[kTileRows];  // the sequence keys that each row sees, but for those that key_mask hides

  // Behind the struct, with hr_row_bits: a bit per HR tile, whether some row sees a key of it.
  __device__ int32_t* seen_tiles() { return reinterpret_cast<int32_t*>(this + 1); }
  __device__ const int32_t* seen_tiles() const { return reinterpret_cast<const int32_t*>(this + 1); }

  // Past the last tile, a tile of keys that do not exist: whoever loads it reads the last row.
  // kBranches: more instructions, but fewer registers; likewise in sees_all.
  template <bool kBranches = false>
  __device__ KeyTile tile(int t) const {
    const bool hr = t >= first_hr_tile;
    if (kBranches && hr) return {true, spans[1].first + t * kTileKeys, spans[1].end};
    if (kBranches) return {false, spans[0].first + t * kTileKeys, spans[0].end};
    const KeySpan& span = spans[hr];
    return {hr, span.first + t * kTileKeys, span.end};
  }

  // The first tile from t on of which some row sees a key.
  __device__ int seen_tile_from(const AttentionInputs& in, int t) const {
    if (!in.hr_row_bits) return t;
    while (sequence_tiles <= t && t < tiles && !bit(seen_tiles(), t - sequence_tiles)) ++t;
    return t;
  }

  __device__ bool sees_hr(const AttentionInputs& in, int row) const {
    return in.hr_rows ? hr_row[row] >= 0 : first_row + row >= hr_from;
  }

  // Whether every row sees every key of the tile.
  template <bool kBranches = false>
  __device__ bool sees_all(const KeyTile& tile) const {
    if (kBranches && tile.hr) return tile.first + kTileKeys <= spans[1].common.end;
    if (kBranches) return spans[0].common.begin <= tile.first && tile.first + kTileKeys <= spans[0].common.end;
    const KeyInterval& common = spans[tile.hr].common;
    return common.begin <= tile.first && tile.first + kTileKeys <= common.end;
  }

  // The keys of the tile, or the first 32 of them, that a row sees, as bits.
  template <typename Word>
  __device__ Word visible_keys(const AttentionInputs& in, const KeyTile& tile, int row) const {
    if (tile.hr) {
      if (!sees_hr(in, row)) return 0;
      const Word keys = low_bits<Word>(tile.end - tile.first);
      return in.hr_row_bits ? keys & bits_from(row_bits(in, sample, hr_row[row]), tile.first, in.selected) : keys;
    }
    const KeyInterval seen = keys_of_row[row];
    const Word keys = low_bits<Word>(seen.end - tile.first) & ~low_bits<Word>(seen.begin - tile.first);
    return in.key_mask ? keys & bits_from(in.key_mask + sample * words_for_bits(in.keys), tile.first, in.keys) : keys;
  }
};

// Rows of keys and of values of a tile.
template <typename T>
__device__ TileRows<T> key_rows(const BlockWork& work, const KeyTile& tile) {
  const KeySource& from = work.sources[tile.hr];
  return {static_cast<const T*>(from.keys), from.key_row_bytes, from.slots, tile.first, tile.end - 1};
}
template <typename T>
__device__ TileRows<T> value_rows(const BlockWork& work, const KeyTile& tile) {
  const KeySource& from = work.sources[tile.hr];
  return {static_cast<const T*>(from.values), from.value_row_bytes, from.slots, tile.first, tile.end - 1};
}

inline size_t work_bytes(int64_t selected) {
  return sizeof(BlockWork) + words_for_bits(blocks_for(selected, kTileKeys)) * sizeof(int32_t);
}

// The order of the blocks that own query rows and stream keys and values.
inline BlockOrder row_order(const AttentionInputs& in) {
  const int64_t streamed = 2 * (in.keys + in.selected) * in.head_dim * bytes_of(in.dtype) * in.kv_heads / in.heads;
  return order_for_cache(in.batch * in.heads, blocks_for(in.queries, kTileRows), streamed, l2_bytes());
}

// One thread.
__device__ inline void find_sources(const AttentionInputs& in, BlockWork& work) {
  const int64_t b = work.sample, head = work.kv_head, element = bytes_of(in.dtype);
  const auto start = [&](const void* data, const Strides& strides, int64_t sample) {
    return static_cast<const char*>(data) + (sample * strides.batch + head * strides.head) * element;
  };
  const auto row_bytes = [&](const Strides& strides) { return static_cast<int>(strides.row * element); };
  work.sources[0] = {start(in.k, in.k_strides, b), start(in.v, in.v_strides, b), nullptr, row_bytes(in.k_strides),
                     row_bytes(in.v_strides)};
  if (!in.k_hr) return;
  work.sources[1] = {start(in.k_hr, in.k_hr_strides, 0), start(in.v_hr, in.v_hr_strides, 0),
                     in.hr_slots + b * in.selected, row_bytes(in.k_hr_strides), row_bytes(in.v_hr_strides)};
}

// Sample, head and query rows from the block's number, and the sequence keys they see. One thread.
__device__ inline void assign_rows(const AttentionInputs& in, const BlockOrder& order, BlockWork& work) {
  const int heads = static_cast<int>(in.heads);
  const BlockPlace place = order.place(static_cast<int>(blockIdx.x));
  const int sample = place.head / heads;
  work.sample = sample;
  work.head = place.head % heads;
  work.kv_head = kv_head_of(in, work.head);
  work.first_row = (order.tiles - 1 - place.tile) * kTileRows;  // the last rows see most keys: they start first
  work.rows = min(kTileRows, static_cast<int>(in.queries) - work.first_row);
  check_ranges(in, sample);
  find_sources(in, work);
  const KeyInterval first = keys_of_query(in, sample, work.first_row),
                    last = keys_of_query(in, sample, work.first_row + work.rows - 1);
  work.spans[0] = {first.begin, last.end, {last.begin, in.key_mask ? last.begin : first.end}};
  work.sequence_tiles = static_cast<int>(blocks_for(max(0, last.end - first.begin), kTileKeys));
}

// The sequence keys that each row sees; a row that does not exist sees those of the last. The whole block.
__device__ inline void find_keys_of_rows(const AttentionInputs& in, BlockWork& work) {
  for (int row = threadIdx.x; row < kTileRows; row += kTileThreads)
    work.keys_of_row[row] = keys_of_query(in, work.sample, work.first_row + min(row, work.rows - 1));
}

// Which rows are listed in hr_rows. The whole block.
__device__ inline void find_listed_rows(const AttentionInputs& in, BlockWork& work) {
  for (int row = threadIdx.x; row < kTileRows; row += kTileThreads) work.hr_row[row] = -1;
  __syncthreads();
  for (int r = threadIdx.x; in.hr_rows && r < in.rows; r += kTileThreads) {
    const int row = static_cast<int>(query_at(in, work.sample, r)) - work.first_row;
    if (0 <= row && row < work.rows) work.hr_row[row] = r;
  }
  __syncthreads();
}

// HR keys, if any row of the block sees them. One thread.
__device__ inline void assign_hr_keys(const AttentionInputs& in, BlockWork& work) {
  work.hr_from = static_cast<int>(in.hr_from ? first_hr_query(in, work.sample) : in.queries);
  bool any = !in.hr_rows && work.first_row + work.rows > work.hr_from;
  for (int row = 0; in.hr_rows && row < kTileRows; ++row) any |= work.hr_row[row] >= 0;
  const int hr_count = static_cast<int>(hr_keys(in, work.sample));
  work.hr_count = any ? hr_count : 0;
  work.alpha = work.hr_count > 0 ? mixing<float>(in, work.sample) : 1.f;
  work.tiles = work.sequence_tiles + static_cast<int>(blocks_for(work.hr_count, kTileKeys));
  work.first_hr_tile = work.hr_count > 0 ? work.sequence_tiles : INT_MAX;
  const bool all_rows = in.hr_from && !in.hr_row_bits && work.first_row >= work.hr_from;
  work.spans[1] = {-work.sequence_tiles * kTileKeys, work.hr_count, {0, all_rows ? work.hr_count : 0}};
}

// Which HR tiles some row sees a key of. The whole block, a word per thread.
__device__ inline void find_seen_tiles(const AttentionInputs& in, BlockWork& work) {
  const int hr_tiles = work.tiles - work.sequence_tiles;
  for (int word = threadIdx.x; word * kBitsPerWord < hr_tiles; word += kTileThreads) {
    uint32_t seen = 0;
    for (int row = 0; row < work.rows; ++row)
      for (int t = 0; work.hr_row[row] >= 0 && t < kBitsPerWord && word * kBitsPerWord + t < hr_tiles; ++t) {
        const int first = (word * kBitsPerWord + t) * kTileKeys;
        if (bits_from(row_bits(in, work.sample, work.hr_row[row]), first, in.selected)) seen |= 1u << t;
      }
    work.seen_tiles()[word] = static_cast<int32_t>(seen);
  }
}

// Fill in `work`. Called by the whole block.
__device__ inline void describe_work(const AttentionInputs& in, const BlockOrder& order, BlockWork& work) {
  if (threadIdx.x == 0) assign_rows(in, order, work);
  __syncthreads();
  find_keys_of_rows(in, work);
  find_listed_rows(in, work);
  if (threadIdx.x == 0) assign_hr_keys(in, work);
  __syncthreads();
  if (!in.hr_row_bits) return;
  find_seen_tiles(in, work);
  __syncthreads();
}

// The keys of the tile, or the first 32 of them, that some row of the block sees, as bits. Called by whole warps.
template <typename Word>
__device__ __forceinline__ Word seen_keys(const AttentionInputs& in, const BlockWork& work, const KeyTile& tile) {
  static_assert(kTileRows == 2 * kWarp, "a lane looks after two queries");
  return warp_or(work.visible_keys<Word>(in, tile, lane()) | work.visible_keys<Word>(in, tile, lane() + kWarp));
}

// Zero those of a tile's first kRows rows in shared memory that belong to keys which no row of the block sees: a weight
// of 0 does not hide a NaN. Return whether there were any. Called by the whole block, before a barrier if there were.
template <typename Mma, int kRows>
__device__ __forceinline__ bool clear_unseen_rows(const AttentionInputs& in, const BlockWork& work, const KeyTile& tile,
                                                  typename Mma::Element* rows) {
  using Word = std::conditional_t<kRows == 32, uint32_t, uint64_t>;
  static_assert(kRows == 8 * sizeof(Word), "a bit per row");
  const Word seen = seen_keys<Word>(in, work, tile);
  if (seen == ~Word{0}) return false;
  for (int row = warp_in_block(); row < kRows; row += warps_in_block())
    if (!(seen >> row & 1) && lane() < Mma::kRowChunks)
      reinterpret_cast<uint4*>(rows)[row * Mma::kRowChunks + lane()] = uint4{};
  return true;
}

}  // namespace flexattn::cuda
