// Which query sees which key: the rules of hierarchical_attention.h as device functions, and the rows they refer to.
#pragma once

#include "bits.cuh"
#include "flexattn/hierarchical_attention.h"
#include "require.cuh"
#include "warp.cuh"

namespace flexattn::cuda {

// ------------------------------------------------------------------------------------------------- the sequence

// Keys begin .. end - 1 of the sequence, or the positions of that number.
struct alignas(8) KeyInterval {
  int begin, end;
};

// The key head that a query head reads.
__device__ inline int kv_head_of(const AttentionInputs& in, int head) {
  return head / static_cast<int>(in.heads / in.kv_heads);
}

__device__ inline int64_t first_key(const AttentionInputs& in, int64_t b) {
  require("hierarchical_attention: kv_start", in.kv_start[b], 0, in.keys);
  return in.kv_start[b];
}

// Position of query 0.
__device__ inline int64_t first_position(const AttentionInputs& in, int64_t b) {
  require("hierarchical_attention: kv_len", in.kv_len[b], in.queries, in.keys);
  return in.kv_len[b] - in.queries;
}

// Refuse bidirectional ranges that do not ascend: the bounds of keys_of_query would not ascend either. The first kernel
// of a pass calls it; those after it rely on that.
__device__ inline void check_ranges(const AttentionInputs& in, int64_t b) {
  const int64_t keys = first_position(in, b) + in.queries;
  const int32_t* range = in.bidirectional_ranges + b * in.ranges * 2;
  int last_end = 0;
  for (int64_t g = 0; g < in.ranges; ++g, range += 2) {
    if (range[0] == range[1]) continue;
    require("hierarchical_attention: bidirectional_ranges", range[0], last_end, range[1]);
    require("hierarchical_attention: bidirectional_ranges", range[1], range[0], keys);
    last_end = range[1];
  }
}

// The bidirectional range that holds a position, or the position alone.
__device__ inline KeyInterval range_around(const AttentionInputs& in, int64_t b, int position) {
  const int32_t* range = in.bidirectional_ranges + b * in.ranges * 2;
  for (int64_t g = 0; g < in.ranges; ++g, range += 2)
    if (range[0] <= position && position < range[1]) return {range[0], range[1]};
  return {position, position + 1};
}

// The keys from `first` on that a query at `position` sees, but for those that key_mask hides.
__device__ inline KeyInterval keys_of_position(const AttentionInputs& in, int64_t b, int first, int position) {
  const KeyInterval range = range_around(in, b, position);
  if (!in.window) return {first, range.end};
  return {max(first, min(range.begin, position + 1 - static_cast<int>(in.window))), range.end};
}
// The keys that query n sees. Neither bound decreases from one query to the next.
__device__ inline KeyInterval keys_of_query(const AttentionInputs& in, int64_t b, int64_t n) {
  return keys_of_position(in, b, static_cast<int>(first_key(in, b)), static_cast<int>(first_position(in, b) + n));
}

__device__ inline bool unmasked(const AttentionInputs& in, int64_t b, int64_t j) {
  return !in.key_mask || bit(in.key_mask + b * words_for_bits(in.keys), j);
}

// Queries begin .. end - 1: those that may see one of the keys first .. last.
struct QueryInterval {
  int begin, end;
};
__device__ inline QueryInterval queries_of_keys(const AttentionInputs& in, int64_t b, int first, int last) {
  const int start = static_cast<int>(first_position(in, b)), queries = static_cast<int>(in.queries);
  const int begin = max(0, range_around(in, b, first).begin - start);
  if (!in.window) return {begin, queries};
  // Widened: last may be far past the sequence.
  const int64_t end = max(last + in.window, static_cast<int64_t>(range_around(in, b, last).end));
  return {begin, static_cast<int>(min(static_cast<int64_t>(queries), end - start))};
}

// ------------------------------------------------------------------------------------ the high-resolution keys

__device__ inline int64_t hr_keys(const AttentionInputs& in, int64_t b) {
  if (!in.k_hr) return 0;
  require("hierarchical_attention: hr_count", in.hr_count[b], 0, in.selected);
  return in.hr_count[b];
}

__device__ inline int64_t slot(const AttentionInputs& in, int64_t b, int64_t m) {
  const int64_t at = in.hr_slots[b * in.selected + m];
  require("hierarchical_attention: hr_slots", at, 0, in.pool - 1);
  return at;
}

// First query that sees HR keys, where hr_from is given.
__device__ inline int64_t first_hr_query(const AttentionInputs& in, int64_t b) {
  require("hierarchical_attention: hr_from", in.hr_from[b], 0, in.queries);
  return in.hr_from[b];
}

// Query at index r of hr_rows, or -1.
__device__ inline int64_t query_at(const AttentionInputs& in, int64_t b, int64_t r) {
  const int64_t n = in.hr_rows[b * in.rows + r];
  require("hierarchical_attention: hr_rows", n, -1, in.queries - 1);
  return n;
}

// Index of query n in hr_rows, or -1. Called by a whole warp.
__device__ inline int64_t find_hr_row(const AttentionInputs& in, int64_t b, int64_t n) {
  for (int64_t r0 = 0; in.hr_rows && r0 < in.rows; r0 += kWarp) {
    const int64_t r = r0 + lane();
    const unsigned found = votes(r < in.rows && query_at(in, b, r) == n);
    if (found) return r0 + __ffs(static_cast<int>(found)) - 1;
  }
  return -1;
}

// Row of the selection by which query n sees HR keys: its index in hr_rows, 0 where rows are not listed, -1 if it sees
// none. Called by a whole warp. Values are checked even where no key or row needs them, as on the host.
__device__ inline int64_t hr_row_of_query(const AttentionInputs& in, int64_t b, int64_t n) {
  const int64_t r = in.hr_from && n >= first_hr_query(in, b) ? 0 : find_hr_row(in, b, n);
  return hr_keys(in, b) > 0 ? r : -1;
}

// Which HR keys row r of the selection sees, as bits; null = all.
__device__ inline const int32_t* row_bits(const AttentionInputs& in, int64_t b, int64_t r) {
  return in.hr_row_bits ? in.hr_row_bits + (b * in.rows + r) * words_for_bits(in.selected) : nullptr;
}

// alpha: the weight of the softmax over all keys in the output of a row that sees HR keys; the softmax over the
// sequence gets the rest.
template <typename A>
__device__ A mixing(const AttentionInputs& in, int64_t b) {
  return in.alpha ? static_cast<A>(in.alpha[b]) : A(1);
}

// --------------------------------------------------------------------------------------------------------- rows

template <typename T>
__device__ const T* row_of(const void* data, const Strides& s, int64_t b, int64_t head, int64_t row) {
  return static_cast<const T*>(data) + b * s.batch + head * s.head + row * s.row;
}

// x . y over d channels; x is widened, y as stored.
template <typename T, typename A>
__device__ A dot(const A* x, const T* y, int64_t d) {
  A sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += x[c] * widen(y[c]);
  return sum;
}

// total[c] = keep * total[c] + sum over j < rows of factor_j * row(j)[c], where factor_j is the argument of lane j.
// Rows with factor 0 are not read. Lane c owns channels c, c + 32, ...; factors: shared memory for 32 values.
template <typename A, typename Row>
__device__ void add_rows(A* total, A keep, A factor, A* factors, int rows, int64_t d, const Row& row) {
  factors[lane()] = factor;
  __syncwarp();
  for (int64_t c = lane(); c < d; c += kWarp) {
    A sum = 0;
    for (int j = 0; j < rows; ++j)
      if (factors[j] != A(0)) sum += factors[j] * widen(row(j)[c]);
    total[c] = keep * total[c] + sum;
  }
  __syncwarp();
}

// Lanes that have work when a warp takes first .. end - 1, one each.
__device__ inline int lanes_used(int64_t first, int64_t end) {
  return end - first < kWarp ? static_cast<int>(end - first) : kWarp;
}

}  // namespace flexattn::cuda
