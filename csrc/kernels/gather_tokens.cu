// Copies of rows, each byte read and written once: 16 bytes per access where addresses and sizes allow, else one
// element.

#include "flexattn/gather_tokens.h"
#include "require.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// Sizes and strides in units.
template <typename Unit>
struct Rows {
  int64_t batch, tokens, selected, width;
  const int32_t* index;
  const Unit* source;
  int64_t source_batch, source_row;
  Unit* result;
};

// A warp writes a row: a copy of source, or zeros if that is null. A lane has several loads in flight before it stores.
template <typename Unit>
__device__ void write_row(Unit* __restrict__ result, const Unit* __restrict__ source, int64_t width) {
  constexpr int kLoads = 4;
  for (int64_t first = lane(); first < width; first += kLoads * kWarp) {
    Unit units[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (source && first + i * kWarp < width) units[i] = source[first + i * kWarp];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (first + i * kWarp < width) result[first + i * kWarp] = units[i];
  }
}

// A warp per selected token.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) gather_rows(Rows<Unit> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_in_block();
  if (row >= p.batch * p.selected) return;
  const int64_t token = p.index[row], b = row / p.selected;
  require("gather_tokens: index", token, -1, p.tokens - 1);
  write_row(p.result + row * p.width, token < 0 ? nullptr : p.source + b * p.source_batch + token * p.source_row,
            p.width);
}

// A block per 32 tokens of the result. It reads the whole index of its sample to learn which of them are selected and
// where; no token occurs twice. Shared memory: position of each of its tokens in the index, or -1.
constexpr int kTile = 32;

template <typename Unit>
__global__ void __launch_bounds__(kThreads) scatter_rows(Rows<Unit> p) {
  const int64_t tiles = blocks_for(p.tokens, kTile), b = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  int32_t* position = shared_memory<int32_t>();
  if (threadIdx.x < kTile) position[threadIdx.x] = -1;
  __syncthreads();
  for (int64_t m = threadIdx.x; m < p.selected; m += kThreads) {
    const int64_t token = p.index[b * p.selected + m];
    require("gather_tokens_backward: index", token, -1, p.tokens - 1);
    if (first <= token && token < first + kTile) position[token - first] = static_cast<int32_t>(m);
  }
  __syncthreads();
  for (int64_t t = warp_in_block(); t < kTile && first + t < p.tokens; t += kWarps)
    write_row(p.result + (b * p.tokens + first + t) * p.width,
              position[t] < 0 ? nullptr : p.source + b * p.source_batch + position[t] * p.source_row, p.width);
}

template <typename Unit>
void move_units(const GatherTokensParams& p, bool scatter, Stream stream) {
  const int64_t per_unit = sizeof(Unit) / p.element_size, width = p.channels / per_unit;
  const Rows<Unit> rows{.batch = p.batch,
                        .tokens = p.tokens,
                        .selected = p.selected,
                        .width = width,
                        .index = p.index,
                        .source = static_cast<const Unit*>(p.source),
                        .source_batch = p.source_batch / per_unit,
                        .source_row = p.source_row / per_unit,
                        .result = static_cast<Unit*>(p.result)};
  if (scatter)
    launch("gather_tokens_backward", scatter_rows<Unit>, p.batch * blocks_for(p.tokens, kTile), kThreads,
           kTile * sizeof(int32_t), stream, rows);
  else
    launch("gather_tokens", gather_rows<Unit>, blocks_for(p.batch * p.selected, kWarps), kThreads, 0, stream, rows);
}

void move_rows(const GatherTokensParams& p, bool scatter, Stream stream) {
  if (in_vectors({p.channels, p.source_row, p.source_batch}, p.element_size) && in_vectors(p.source) &&
      in_vectors(p.result))
    return move_units<uint4>(p, scatter, stream);
  switch (p.element_size) {
    case 2:
      return move_units<uint16_t>(p, scatter, stream);
    case 4:
      return move_units<uint32_t>(p, scatter, stream);
    default:
      return move_units<uint64_t>(p, scatter, stream);
  }
}

}  // namespace

void gather_tokens(const GatherTokensParams& params, Stream stream) { move_rows(params, false, stream); }
void scatter_tokens(const GatherTokensParams& params, Stream stream) { move_rows(params, true, stream); }

}  // namespace flexattn::cuda
