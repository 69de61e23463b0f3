// Rows in, rows out: 16 bytes per thread where addresses and sizes allow, else one element.

#include "flexattn/gather_tokens.h"
#include "launch.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 256;

// Unit is what a thread moves; strides and sizes count units.
template <typename Unit>
__global__ void gather_rows(const Unit* source, int64_t source_batch, int64_t source_row, const int32_t* index, int64_t rows,
                            int64_t selected, int64_t tokens, int64_t width, Unit* result) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / width, c = i % width;
  if (row >= rows) return;
  const int64_t token = index[row];
  if (token >= tokens) __trap();  // reading on would return another tensor's memory as if it were right
  result[i] = token < 0 ? Unit{} : source[row / selected * source_batch + token * source_row + c];
}

template <typename Unit>
__global__ void scatter_rows(const Unit* source, int64_t source_batch, int64_t source_row, const int32_t* index, int64_t rows,
                             int64_t selected, int64_t tokens, int64_t width, Unit* result) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / width, c = i % width;
  if (row >= rows) return;
  const int64_t token = index[row], b = row / selected;
  if (token >= tokens) __trap();
  if (token >= 0) result[(b * tokens + token) * width + c] = source[b * source_batch + row % selected * source_row + c];
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename Unit>
void move_rows(const GatherTokensParams& p, bool scatter, Stream stream) {
  const int64_t per_unit = sizeof(Unit) / p.element_size, width = p.channels / per_unit, rows = p.batch * p.selected;
  launch(scatter ? "scatter_rows" : "gather_rows", scatter ? scatter_rows<Unit> : gather_rows<Unit>,
         blocks_for(rows * width, kThreads), kThreads, 0, stream, static_cast<const Unit*>(p.source), p.source_batch / per_unit,
         p.source_row / per_unit, p.index, rows, p.selected, p.tokens, width, static_cast<Unit*>(p.result));
}

void move_rows(const GatherTokensParams& p, bool scatter, Stream stream) {
  const auto divides = [&](int64_t elements) { return elements * p.element_size % sizeof(uint4) == 0; };
  if (divides(p.channels) && divides(p.source_row) && divides(p.source_batch) && aligned(p.source, 16) && aligned(p.result, 16))
    return move_rows<uint4>(p, scatter, stream);
  if (p.element_size == 2) return move_rows<uint16_t>(p, scatter, stream);
  if (p.element_size == 4) return move_rows<uint32_t>(p, scatter, stream);
  return move_rows<uint64_t>(p, scatter, stream);
}

}  // namespace

void gather_tokens(const GatherTokensParams& params, Stream stream) { move_rows(params, false, stream); }

void scatter_tokens(const GatherTokensParams& params, Stream stream) {
  const size_t bytes = params.batch * params.tokens * params.channels * params.element_size;
  cudaMemsetAsync(params.result, 0, bytes, static_cast<cudaStream_t>(stream));
  move_rows(params, true, stream);
}

}  // namespace flexattn::cuda
