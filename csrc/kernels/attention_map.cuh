// The attention map: for the rows whose selection the next layer needs, the probabilities of the keys of each image,
// summed over the heads in their order. Kernels differ in where the logits come from; the map is written here.
#pragma once

#include "softmax.cuh"
#include "visibility.cuh"

namespace flexattn::cuda {

// Query of row r of the map, or -1.
__device__ inline int64_t query_of_map_row(const AttentionInputs& in, int64_t b, int64_t r) {
  return in.hr_rows ? query_at(in, b, r) : in.queries - 1;
}

// Row of the map that query n has, or -1. Called by a whole warp.
__device__ inline int64_t map_row_of_query(const AttentionInputs& in, int64_t b, int64_t n) {
  if (in.hr_rows) return find_hr_row(in, b, n);
  return n == in.queries - 1 ? 0 : -1;
}

// The keys that are the cells of an image.
__device__ inline KeyInterval image_keys(const AttentionForwardParams& p, int64_t b, int64_t image) {
  const int32_t* range = p.map_ranges + (b * p.images + image) * 2;
  require("hierarchical_attention: map_ranges", range[0], 0, p.in.keys);
  require("hierarchical_attention: map_ranges", range[1], range[0], min(p.in.keys, range[0] + p.map_size));
  if (range[1] != range[0])
    require("hierarchical_attention: a length in map_ranges", range[1] - range[0], p.map_size, p.map_size);
  return {range[0], range[1]};
}

FLEXATTN_HOST_DEVICE inline int64_t map_cells(const AttentionForwardParams& p) {
  return p.in.batch * p.in.rows * p.images * p.map_size;
}

struct MapCell {
  int64_t index;              // in [B, R, I, S*S]
  int64_t b, r, image, cell;  // the same, taken apart
  int64_t query, key;
  bool visible;  // whether the query sees the key
};

__device__ inline MapCell map_cell(const AttentionForwardParams& p, int64_t index) {
  const AttentionInputs& in = p.in;
  MapCell cell{index};
  cell.cell = index % p.map_size;
  cell.image = index / p.map_size % p.images;
  cell.r = index / p.map_size / p.images % in.rows;
  cell.b = index / p.map_size / p.images / in.rows;
  const KeyInterval keys = image_keys(p, cell.b, cell.image);
  cell.query = query_of_map_row(in, cell.b, cell.r);
  cell.key = keys.begin + cell.cell;
  cell.visible = false;
  if (cell.query >= 0 && cell.key < keys.end) {
    const KeyInterval seen = keys_of_query(in, cell.b, cell.query);
    cell.visible = seen.begin <= cell.key && cell.key < seen.end && unmasked(in, cell.b, cell.key);
  }
  return cell;
}

// Log-sum-exp that the probabilities of a cell are relative to in one head.
template <typename A>
__device__ A lse_of_map(const AttentionForwardParams& p, const MapCell& cell, int64_t head) {
  const void* lse = p.map_over_all ? p.lse : p.lse_seq;
  return static_cast<const A*>(lse)[(cell.b * p.in.heads + head) * p.in.queries + cell.query];
}

// Write a cell. logit(head) is in base 2, lse(head) in base e; neither is called for a cell that is not visible.
// kAhead: the number of heads whose logits are in flight at a time.
template <typename A, int kAhead, typename Logit, typename Lse>
__device__ void write_map_cell(const AttentionForwardParams& p, const MapCell& cell, const Logit& logit,
                               const Lse& lse) {
  A sum = 0;
  if (cell.visible) {
#pragma unroll kAhead
    for (int64_t head = 0; head < p.in.heads; ++head) sum += exp2(logit(head) - lse(head) * A(kLog2e));
  }
  static_cast<A*>(p.map)[cell.index] = sum;
}

}  // namespace flexattn::cuda
