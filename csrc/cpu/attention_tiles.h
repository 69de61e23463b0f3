// What the forward and the backward pass over the tiles of an attention matrix share: which queries and keys form a
// tile, how they are read, and which query sees which key.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "bits.h"
#include "flexattn/hierarchical_attention.h"
#include "storage.h"
#include "vector_math.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "torch's thread pool is OpenMP: compile with -fopenmp, without which at::parallel_for runs on one thread"
#endif

namespace flexattn::cpu {

constexpr int64_t kTileQueries = 64;
constexpr int64_t kTileKeys = 128;
constexpr int64_t kFewRows = 4;  // up to this many queries are handled one by one, more of them in lanes

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// A row-major matrix whose rows are ld elements apart.
template <typename A>
struct Matrix {
  const A* data;
  int64_t ld;
};

// Return rows of a tensor (those listed in `slots`, if given) as accumulator values: in place if they are of that type
// and contiguous, as the slots of a sample usually are; else as a copy in `scratch`.
template <typename T, typename A>
Matrix<A> read_rows(const T* data, int64_t stride, const int32_t* slots, int64_t rows, int64_t d,
                    std::vector<A>& scratch) {
  if (slots) {
    bool contiguous = true;
    for (int64_t i = 1; i < rows; ++i) contiguous &= slots[i] == slots[0] + i;
    if (contiguous) data += slots[0] * stride, slots = nullptr;
  }
  if constexpr (std::is_same_v<T, A>)
    if (!slots) return {data, stride};
  scratch.resize(std::max<size_t>(scratch.size(), rows * d));
  widen_rows(data, stride, slots, rows, d, scratch.data());
  return {scratch.data(), d};
}

// The keys of a tile that its queries do not see, as the functions of Sample that hide keys tell it. All queries of the
// tile see the same.
class UnseenKeys {
 public:
  explicit UnseenKeys(int64_t keys) : unseen_(keys) {}
  void hide(int64_t, int64_t j) { any_ = unseen_[j] = true; }

  // The rows of the keys or values, with zeros for the unseen ones: a weight of 0 does not hide a NaN.
  template <typename A>
  Matrix<A> cleared(Matrix<A> rows, int64_t d, std::vector<A>& scratch) const {
    if (!any_) return rows;
    std::vector<A> clean(unseen_.size() * d);
    for (size_t j = 0; j < unseen_.size(); ++j)
      if (!unseen_[j]) std::copy_n(rows.data + j * rows.ld, d, clean.data() + j * d);
    scratch.swap(clean);
    return {scratch.data(), d};
  }

 private:
  std::vector<char> unseen_;
  bool any_ = false;
};

template <typename T>
bool all_finite(const T* row, int64_t d) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const T infinity = std::numeric_limits<T>::infinity();
  Bits exponent;
  std::memcpy(&exponent, &infinity, sizeof exponent);
  bool found = false;
  for (int64_t c = 0; c < d; ++c) {
    Bits bits;
    std::memcpy(&bits, row + c, sizeof bits);
    found |= (bits & exponent) == exponent;
  }
  return !found;
}

// Run tasks of unequal size, each on the next free thread. They must be independent: then the result does not depend on
// which thread runs which.
template <typename Function>
void for_each_task(int64_t tasks, const Function& function) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < tasks;) function(task);
  });
}

// The queries of one sample that share a key/value head, ordered by position, then head; a tile is a range of them.
struct QueryRows {
  const AttentionInputs& in;
  int64_t b, kv_head;

  int64_t group() const { return in.heads / in.kv_heads; }
  int64_t count() const { return in.queries * group(); }
  int64_t query(int64_t row) const { return row / group(); }
  int64_t head(int64_t row) const { return kv_head * group() + row % group(); }
  // One past the last row of the tile from `first` on. If each query has a tile of its own, its rows see the same keys.
  int64_t end_of_tile(int64_t first, bool tile_per_query) const {
    const int64_t end = tile_per_query ? (query(first) + 1) * group() : first + kTileQueries;
    return std::min(end, count());
  }
  int64_t statistic(int64_t row) const { return (b * in.heads + head(row)) * in.queries + query(row); }  // in [B, H, N]
};

// A query that sees HR keys, and its index in hr_rows (0 if the rows are not listed).
struct HrRow {
  int64_t query;
  int64_t hr_row;
};

// The same, for a row of a tile.
struct HrTileRow {
  int64_t row;
  int64_t hr_row;
};

// Keys begin .. end - 1 of the sequence.
struct KeyInterval {
  int64_t begin, end;
};

// Which query of one sample sees which key.
struct Sample {
  const AttentionInputs& in;
  int64_t b;

  int64_t position(int64_t query) const { return in.kv_len[b] - in.queries + query; }
  // The bidirectional range that holds a position, or the position alone.
  KeyInterval range_around(int64_t p) const {
    for (int64_t g = 0; g < in.ranges; ++g) {
      const int32_t* range = in.bidirectional_ranges + (b * in.ranges + g) * 2;
      if (range[0] <= p && p < range[1]) return {range[0], range[1]};
    }
    return {p, p + 1};
  }
  // The sequence keys that a query sees, but for those that key_mask hides. Neither bound decreases with the query.
  KeyInterval keys_of(int64_t query) const {
    const int64_t p = position(query);
    const KeyInterval range = range_around(p);
    const int64_t first = in.window ? std::min(range.begin, p + 1 - in.window) : 0;
    return {std::max<int64_t>({first, in.kv_start[b], 0}), std::min(range.end, in.keys)};
  }
  int64_t hr_keys() const { return in.k_hr ? in.hr_count[b] : 0; }
  const int32_t* slots() const { return in.hr_slots + b * in.selected; }
  double alpha() const { return in.alpha ? in.alpha[b] : 1.0; }
  const int32_t* key_bits() const { return in.key_mask ? in.key_mask + b * words_for_bits(in.keys) : nullptr; }
  // Which HR keys row r of hr_rows sees, as bits; null = all.
  const int32_t* row_bits(int64_t r) const {
    return in.hr_row_bits ? in.hr_row_bits + (b * in.rows + r) * words_for_bits(in.selected) : nullptr;
  }

  // Hide those of the keys j0 .. j0 + n - 1 that a query does not see. query(row) must ascend.
  template <class Logits, typename Query>
  void hide_sequence_keys(Logits& logits, int64_t rows, const Query& query, int64_t j0, int64_t n) const {
    if (keys_of(query(rows - 1)).begin > j0 || keys_of(query(0)).end < j0 + n)
      for (int64_t i = 0; i < rows; ++i) {
        const KeyInterval seen = keys_of(query(i));
        for (int64_t j = 0; j < std::min(n, seen.begin - j0); ++j) logits.hide(i, j);
        for (int64_t j = std::max<int64_t>(0, seen.end - j0); j < n; ++j) logits.hide(i, j);
      }
    if (const int32_t* bits = key_bits())
      for (int64_t j = 0; j < n; ++j)
        if (!bit(bits, j0 + j))
          for (int64_t i = 0; i < rows; ++i) logits.hide(i, j);
  }

  template <class Logits>
  void hide_hr_keys(Logits& logits, const std::vector<HrTileRow>& hr_rows, int64_t j0, int64_t n) const {
    for (size_t i = 0; i < hr_rows.size(); ++i)
      if (const int32_t* bits = row_bits(hr_rows[i].hr_row))
        for (int64_t j = 0; j < n; ++j)
          if (!bit(bits, j0 + j)) logits.hide(i, j);
  }

  // Whether the keys and values that some query may see are finite.
  template <typename T>
  bool finite(int64_t kv_head) const {
    const auto finite_row = [&](const void* data, const Strides& s, int64_t batch, int64_t row) {
      return all_finite(static_cast<const T*>(data) + batch * s.batch + kv_head * s.head + row * s.row, in.head_dim);
    };
    for (int64_t j = keys_of(0).begin; j < keys_of(in.queries - 1).end; ++j)
      if (!finite_row(in.k, in.k_strides, b, j) || !finite_row(in.v, in.v_strides, b, j)) return false;
    for (int64_t m = 0; m < hr_keys(); ++m)
      if (!finite_row(in.k_hr, in.k_hr_strides, 0, slots()[m]) || !finite_row(in.v_hr, in.v_hr_strides, 0, slots()[m]))
        return false;
    return true;
  }

  // The queries that see HR keys, in ascending order.
  std::vector<HrRow> hr_rows() const {
    std::vector<HrRow> rows;
    if (hr_keys() == 0) return rows;
    if (in.hr_rows) {
      for (int64_t r = 0; r < in.rows; ++r)
        if (const int64_t query = in.hr_rows[b * in.rows + r]; query >= 0) rows.push_back({query, r});
      std::sort(rows.begin(), rows.end(), [](const HrRow& x, const HrRow& y) { return x.query < y.query; });
    } else if (in.hr_from) {
      for (int64_t query = std::max<int64_t>(in.hr_from[b], 0); query < in.queries; ++query) rows.push_back({query, 0});
    }
    return rows;
  }
};

// Which rows of a tile see HR keys, given the queries of the sample that do. query(row) must ascend.
template <typename Query>
std::vector<HrTileRow> hr_rows_of_tile(const std::vector<HrRow>& of_sample, int64_t rows, const Query& query) {
  std::vector<HrTileRow> hr_rows;
  auto next = std::lower_bound(of_sample.begin(), of_sample.end(), query(0),
                               [](const HrRow& x, int64_t n) { return x.query < n; });
  for (int64_t row = 0; row < rows; ++row) {
    while (next != of_sample.end() && next->query < query(row)) ++next;
    if (next != of_sample.end() && next->query == query(row)) hr_rows.push_back({row, next->hr_row});
  }
  return hr_rows;
}

}  // namespace flexattn::cpu
