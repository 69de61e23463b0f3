// The attention map on tensor cores. A block owns 64 rows of the map and 64 cells of an image, a warp 16 of the rows;
// the heads pass by, and the probabilities are summed in registers. The scores are computed again from the
// log-sum-exps: keeping them would take a float per head and cell.
#pragma once

#include "attention_map.cuh"
#include "attention_tiles.cuh"

namespace flexattn::cuda {

constexpr int kMapCells = 2 * kPassingRows;  // the keys of a head pass by as two tensors of rows
static_assert(kMapCells == 64, "what a row sees of them is 64 bits");

FLEXATTN_HOST_DEVICE inline int64_t map_blocks(const AttentionForwardParams& p) {
  return p.in.batch * blocks_for(p.in.rows, kTileRows) * p.images * blocks_for(p.map_size, kMapCells);
}

// Shared memory: passing keys, the block's work.
template <typename Mma>
constexpr size_t kMapTileElements = 2 * kPassingBuffers<Mma> * kPassingElements<Mma>;

struct MapWork {
  int sample, image;
  int first_row, first_cell;
  KeyInterval keys;      // of the image
  int query[kTileRows];  // of each row, or -1
};

template <typename Mma>
constexpr size_t map_shared_bytes() {
  return kMapTileElements<Mma> * sizeof(typename Mma::Element) + sizeof(MapWork);
}

// Fill in `work`. Called by the whole block.
__device__ inline void describe_map(const AttentionForwardParams& p, MapWork& work) {
  const int cell_tiles = static_cast<int>(blocks_for(p.map_size, kMapCells)), images = static_cast<int>(p.images),
            row_tiles = static_cast<int>(blocks_for(p.in.rows, kTileRows)), block = static_cast<int>(blockIdx.x),
            sample = block / cell_tiles / images / row_tiles,
            first_row = block / cell_tiles / images % row_tiles * kTileRows;
  if (threadIdx.x == 0) {
    work.sample = sample;
    work.image = block / cell_tiles % images;
    work.first_row = first_row;
    work.first_cell = block % cell_tiles * kMapCells;
    work.keys = image_keys(p, sample, work.image);
  }
  for (int row = threadIdx.x; row < kTileRows; row += kTileThreads) {
    const int r = first_row + row;
    work.query[row] = r < p.in.rows ? static_cast<int>(query_of_map_row(p.in, sample, r)) : -1;
  }
  __syncthreads();
}

// The cells of the block that query n sees, as bits.
__device__ inline uint64_t visible_cells(const AttentionForwardParams& p, const MapWork& work, int n) {
  if (n < 0) return 0;
  const int first = work.keys.begin + work.first_cell;
  const KeyInterval seen = keys_of_query(p.in, work.sample, n);
  const uint64_t cells = low_bits(min(work.keys.end, seen.end) - first) & ~low_bits(seen.begin - first);
  if (!p.in.key_mask || cells == 0) return cells;
  return cells & bits_from(p.in.key_mask + work.sample * words_for_bits(p.in.keys), first, p.in.keys);
}

// The keys that a head reads, from cell `first` of the block on.
template <typename T>
__device__ TileRows<T> keys_of_cells(const AttentionForwardParams& p, const MapWork& work, int head, int first) {
  return {row_of<T>(p.in.k, p.in.k_strides, work.sample, kv_head_of(p.in, head), 0), row_bytes<T>(p.in.k_strides),
          nullptr, work.keys.begin + work.first_cell + first, work.keys.end - 1};
}

// A lane's part of the map. kScores: how many scores of a lane are added at a time, kAddedCells cells of each row.
template <typename Rows, int kScores, int kAddedCells>
struct MapSums {
  const AttentionForwardParams& p;
  const MapWork& work;
  int query[Rows::kLaneRows];         // of the lane's rows, or -1
  uint64_t visible[Rows::kLaneRows];  // the cells that they see, from the lane's first on
  float sum[kMapCells / kAddedCells * kScores] = {};

  __device__ MapSums(const AttentionForwardParams& p, const MapWork& work) : p(p), work(work) {
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which) {
      query[which] = work.query[block_row<Rows>(which)];
      visible[which] = visible_cells(p, work, query[which]) >> Rows::key_of_lane();
    }
  }

  // Add what a head gives kAddedCells cells, from cell kAddedCells * part on. lse: in base 2.
  template <int part>
  __device__ __forceinline__ void add(const float (&s)[kScores], float scale, const float (&lse)[Rows::kLaneRows]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int which = Rows::row_of(i);
      const float probability = exp2_approx(scale * s[i] - lse[which]);
      const bool seen = visible[which] >> (part * kAddedCells + Rows::key_of_score(i)) & 1;
      sum[part * kScores + i] += seen ? probability : 0.f;
    }
  }

  __device__ void read_lse(int head, float (&lse)[Rows::kLaneRows]) const {
    const float* of_head = static_cast<const float*>(p.map_over_all ? p.lse : p.lse_seq) +
                           (static_cast<int64_t>(work.sample) * p.in.heads + head) * p.in.queries;
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which)
      lse[which] = static_cast<float>(kLog2e) * of_head[max(query[which], 0)];
  }

  __device__ void write() const {
#pragma unroll
    for (int which = 0; which < Rows::kLaneRows; ++which) {
      const int64_t r = work.first_row + block_row<Rows>(which);
      if (r >= p.in.rows) continue;
      float* to = static_cast<float*>(p.map) + ((work.sample * p.in.rows + r) * p.images + work.image) * p.map_size;
#pragma unroll
      for (int i = 0; i < kMapCells / kAddedCells * kScores; ++i) {
        const int cell =
            work.first_cell + i / kScores * kAddedCells + Rows::key_of_lane() + Rows::key_of_score(i % kScores);
        if (Rows::row_of(i) == which && cell < p.map_size) to[cell] = sum[i];
      }
    }
  }
};

template <typename Mma, int kD>
struct MapTile : MapSums<Mma, kPassingScores, kPassingRows> {
  using T = typename Mma::Element;
  using MapSums<Mma, kPassingScores, kPassingRows>::MapSums;
  Mma mma;

  // The keys of half of the cells.
  __device__ TileRows<T> keys(int head, int half) const {
    return keys_of_cells<T>(this->p, this->work, head, half * kPassingRows);
  }

  __device__ __forceinline__ void load_query(int head) {
    const AttentionInputs& in = this->p.in;
    const int* rows = this->work.query + warp_in_block() * kWarpRows;
    mma.load_query([&](int row) { return row_of<T>(in.q, in.q_strides, this->work.sample, head, max(rows[row], 0)); },
                   static_cast<int>(in.head_dim));
  }

  // Add the probabilities of half of the cells in a head. lse: in base 2.
  template <int half>
  __device__ __forceinline__ void add_keys(const T* keys, float scale, const float (&lse)[2]) {
    float s[kPassingScores] = {};
    multiply_all_keys(mma, s, keys);
    cap_scores(this->p.in, s, scale);
    this->template add<half>(s, scale, lse);
  }
};

template <typename Mma, int kD>
__global__ void __launch_bounds__(kTileThreads, 2) map_tiles(AttentionForwardParams p) {
  using T = typename Mma::Element;
  T* shared = shared_memory<T>();
  MapWork& work = *reinterpret_cast<MapWork*>(shared + kMapTileElements<Mma>);
  const int heads = static_cast<int>(p.in.heads), d = static_cast<int>(p.in.head_dim);
  clear_rows<Mma, kD>(shared, 2 * kPassingBuffers<Mma> * kPassingRows, d);
  describe_map(p, work);

  MapTile<Mma, kD> tile(p, work);
  PassingRows<Mma, kD, kTileThreads> passing;
  passing.buffers = shared;
  const float scale = static_cast<float>(p.in.scale * kLog2e);
  if (work.keys.begin < work.keys.end) {
    passing.issue_others(tile.keys(0, 0), tile.keys(0, 1), d);
    passing.commit(d);
    __syncthreads();
    for (int head = 0; head < heads; ++head) {
      const bool more = head + 1 < heads && kv_head_of(p.in, head + 1) != kv_head_of(p.in, head);
      if (more) passing.issue_others(tile.keys(head + 1, 0), tile.keys(head + 1, 1), d);
      float lse[2];
      tile.read_lse(head, lse);
      tile.load_query(head);
      tile.template add_keys<0>(passing.rows(0), scale, lse);
      tile.template add_keys<1>(passing.rows(1), scale, lse);
      if (more) passing.commit(d);
      __syncthreads();
    }
  }
  tile.write();
}

}  // namespace flexattn::cuda
