// Who sees what: the rules of hierarchical_attention.h as device functions.
#pragma once

#include "flexattn/hierarchical_attention.h"
#include "numeric.cuh"
#include "warp.cuh"

namespace flexattn::cuda {

__device__ inline bool bit(const int32_t* words, int64_t i) {
  return (static_cast<uint32_t>(words[i / kBitsPerWord]) >> (i % kBitsPerWord)) & 1u;
}

// One past the last position that query n of sample b may see.
__device__ inline int64_t end_of_keys(const AttentionInputs& in, int64_t b, int64_t n) {
  const int64_t end = in.kv_len[b] - in.queries + n + 1;
  return end < in.keys ? end : in.keys;
}

__device__ inline int64_t first_key(const AttentionInputs& in, int64_t b) { return in.kv_start[b] > 0 ? in.kv_start[b] : 0; }

__device__ inline bool unmasked(const AttentionInputs& in, int64_t b, int64_t j) {
  return !in.key_mask || bit(in.key_mask + b * words_for_bits(in.keys), j);
}

__device__ inline int64_t hr_keys(const AttentionInputs& in, int64_t b) { return in.k_hr ? in.hr_count[b] : 0; }

// Place of query row n in hr_rows (0 where the rows are not listed), or -1 when it sees no HR key. Asked by a whole warp.
__device__ inline int64_t listed_row(const AttentionInputs& in, int64_t b, int64_t n) {
  if (hr_keys(in, b) == 0) return -1;
  if (in.hr_from) return n >= in.hr_from[b] ? 0 : -1;
  if (!in.hr_rows) return -1;
  for (int64_t r0 = 0; r0 < in.rows; r0 += kWarp) {
    const int64_t r = r0 + lane();
    const unsigned found = __ballot_sync(kAllLanes, r < in.rows && in.hr_rows[b * in.rows + r] == n);
    if (found) return r0 + __ffs(found) - 1;
  }
  return -1;
}

// The bits of the HR keys that a listed row sees; null = all.
__device__ inline const int32_t* row_bits(const AttentionInputs& in, int64_t b, int64_t listed) {
  return in.hr_row_bits ? in.hr_row_bits + (b * in.rows + listed) * words_for_bits(in.selected) : nullptr;
}

template <typename T>
__device__ const T* row_of(const void* data, const Strides& s, int64_t b, int64_t head, int64_t row) {
  return static_cast<const T*>(data) + b * s.batch + head * s.head + row * s.row;
}

template <typename T, typename A>
__device__ A dot(const A* x, const T* y, int64_t d) {
  A sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += x[c] * widen(y[c]);
  return sum;
}

template <typename T>
__device__ typename Accumulator<T>::type dot_rows(const T* x, const T* y, int64_t d) {
  typename Accumulator<T>::type sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += widen(x[c]) * widen(y[c]);
  return sum;
}

}  // namespace flexattn::cuda
