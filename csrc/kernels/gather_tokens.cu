// Rows in, rows out: 16 bytes per thread where addresses and sizes allow, else one element.

#include "flexattn/gather_tokens.h"
#include "launch.cuh"
#include "require.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 256;

// Sizes and strides in units; a thread moves one Unit.
template <typename Unit>
struct Rows {
  int64_t batch, tokens, selected, width;
  const int32_t* index;
  const Unit* source;
  int64_t source_batch, source_row;
  Unit* result;
};

template <typename Unit>
__global__ void gather_rows(Rows<Unit> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / p.width, c = i % p.width;
  if (row >= p.batch * p.selected) return;
  const int64_t token = p.index[row], b = row / p.selected;
  require("gather_tokens: index", token, -1, p.tokens - 1);
  p.result[i] = token < 0 ? Unit{} : p.source[b * p.source_batch + token * p.source_row + c];
}

// No token stands twice in a row of the index, so that no two threads write the same place.
template <typename Unit>
__global__ void scatter_rows(Rows<Unit> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / p.width, c = i % p.width;
  if (row >= p.batch * p.selected) return;
  const int64_t token = p.index[row], b = row / p.selected, m = row % p.selected;
  require("gather_tokens_backward: index", token, -1, p.tokens - 1);
  if (token >= 0) p.result[(b * p.tokens + token) * p.width + c] = p.source[b * p.source_batch + m * p.source_row + c];
}

template <typename Unit>
void move_units(const GatherTokensParams& p, bool scatter, Stream stream) {
  const int64_t per_unit = sizeof(Unit) / p.element_size, width = p.channels / per_unit;
  const Rows<Unit> rows{p.batch, p.tokens, p.selected, width, p.index, static_cast<const Unit*>(p.source),
                        p.source_batch / per_unit, p.source_row / per_unit, static_cast<Unit*>(p.result)};
  launch(scatter ? "gather_tokens_backward" : "gather_tokens", scatter ? scatter_rows<Unit> : gather_rows<Unit>,
         blocks_for(p.batch * p.selected * width, kThreads), kThreads, 0, stream, rows);
}

void move_rows(const GatherTokensParams& p, bool scatter, Stream stream) {
  const auto fits = [&](int64_t elements) { return elements * p.element_size % sizeof(uint4) == 0; };
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0; };
  if (fits(p.channels) && fits(p.source_row) && fits(p.source_batch) && aligned(p.source) && aligned(p.result))
    return move_units<uint4>(p, scatter, stream);
  switch (p.element_size) {
    case 2: return move_units<uint16_t>(p, scatter, stream);
    case 4: return move_units<uint32_t>(p, scatter, stream);
    default: return move_units<uint64_t>(p, scatter, stream);
  }
}

}  // namespace

void gather_tokens(const GatherTokensParams& params, Stream stream) { move_rows(params, false, stream); }

void scatter_tokens(const GatherTokensParams& params, Stream stream) {
  clear(params.result, params.batch * params.tokens * params.channels * params.element_size, stream);
  move_rows(params, true, stream);
}

}  // namespace flexattn::cuda
