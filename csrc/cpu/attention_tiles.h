// What the forward and the backward pass over the tiles of an attention matrix share: reading a tile of any dtype,
// products of tiles, and the rules of who sees what.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "flexattn/hierarchical_attention.h"
#include "vector_math.h"

namespace flexattn::cpu {

constexpr int64_t kTileQueries = 128;
constexpr int64_t kTileKeys = 512;
constexpr int64_t kFewRows = 4;  // up to here a product is done row by row, which reads the other matrix once

template <typename T>
struct Accumulator { using type = float; };
template <>
struct Accumulator<double> { using type = double; };

// A row-major matrix whose rows stand ld elements apart.
template <typename A>
struct Matrix {
  const A* data;
  int64_t ld;
};

// Rows of a tensor as accumulator values: where they lie when they are of that type already, else widened into `scratch`.
template <typename T, typename A>
Matrix<A> read_rows(const T* data, int64_t stride, int64_t rows, int64_t d, std::vector<A>& scratch) {
  if constexpr (std::is_same_v<T, A>) {
    return {data, stride};
  } else {
    scratch.resize(std::max<size_t>(scratch.size(), rows * d));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < d; ++c) scratch[i * d + c] = static_cast<A>(data[i * stride + c]);
    return {scratch.data(), d};
  }
}

// Rows of the HR pool named by `slots`. Slots that follow each other, the usual case, are read in place.
template <typename T, typename A>
Matrix<A> read_slots(
    const T* pool, int64_t stride, const int32_t* slots, int64_t rows, int64_t d, std::vector<A>& scratch) {
  bool in_a_row = true;
  for (int64_t i = 1; i < rows; ++i) in_a_row &= slots[i] == slots[0] + i;
  if (in_a_row) return read_rows<T, A>(pool + slots[0] * stride, stride, rows, d, scratch);
  scratch.resize(std::max<size_t>(scratch.size(), rows * d));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < d; ++c) scratch[i * d + c] = static_cast<A>(pool[slots[i] * stride + c]);
  return {scratch.data(), d};
}

template <typename A>
at::Tensor view(const A* data, int64_t rows, int64_t columns, int64_t ld) {
  return at::from_blob(const_cast<A*>(data), {rows, columns}, {ld, 1}, at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value));
}

// out[m, n] = scale * x[m, d] y[n, d]^T
template <typename A>
void multiply_transposed(Matrix<A> x, int64_t m, Matrix<A> y, int64_t n, int64_t d, A scale, A* out, int64_t out_ld) {
  if (m <= kFewRows) {
    for (int64_t i = 0; i < m; ++i) dot_rows(x.data + i * x.ld, y.data, y.ld, n, d, scale, out + i * out_ld);
    return;
  }
  at::Tensor result = view(out, m, n, out_ld);
  at::addmm_out(result, result, view(x.data, m, d, x.ld), view(y.data, n, d, y.ld).t(), 0, scale);
}

// out[m, d] += w[m, n] y[n, d]
template <typename A>
void add_product(Matrix<A> w, int64_t m, Matrix<A> y, int64_t n, int64_t d, A* out, int64_t out_ld) {
  if (m <= kFewRows) {
    for (int64_t i = 0; i < m; ++i) add_weighted_rows(w.data + i * w.ld, y.data, y.ld, n, d, out + i * out_ld);
    return;
  }
  at::Tensor result = view(out, m, d, out_ld);
  at::addmm_out(result, result, view(w.data, m, n, w.ld), view(y.data, n, d, y.ld));
}

// out[n, d] += w[m, n]^T y[m, d]
template <typename A>
void add_transposed_product(Matrix<A> w, int64_t m, int64_t n, Matrix<A> y, int64_t d, A* out, int64_t out_ld) {
  at::Tensor result = view(out, n, d, out_ld);
  at::addmm_out(result, result, view(w.data, m, n, w.ld).t(), view(y.data, m, d, y.ld));
}

inline bool bit(const int32_t* words, int64_t i) {
  return (static_cast<uint32_t>(words[i / kBitsPerWord]) >> (i % kBitsPerWord)) & 1u;
}

// One sample's answers to "who sees what".
struct Sample {
  const AttentionInputs& in;
  int64_t b;

  int64_t position(int64_t query) const { return in.kv_len[b] - in.queries + query; }
  int64_t first_key() const { return std::max<int64_t>(in.kv_start[b], 0); }
  // One past the last sequence key that any of the queries before `end` sees.
  int64_t end_of_keys(int64_t end) const { return std::min<int64_t>(in.keys, position(end - 1) + 1); }
  int64_t hr_keys() const { return in.k_hr ? in.hr_count[b] : 0; }
  const int32_t* slots() const { return in.hr_slots + b * in.selected; }
  double alpha() const { return in.alpha ? in.alpha[b] : 1.0; }

  // -inf into the logits [m, n] of queries i0.. and keys j0.. that may not see each other.
  template <typename A>
  void mask_sequence(A* logits, int64_t ld, int64_t i0, int64_t m, int64_t j0, int64_t n) const {
    constexpr A kHidden = -std::numeric_limits<A>::infinity();
    const int32_t* words = in.key_mask ? in.key_mask + b * words_for_bits(in.keys) : nullptr;
    for (int64_t i = 0; i < m; ++i) {
      A* row = logits + i * ld;
      const int64_t end = std::clamp<int64_t>(position(i0 + i) + 1 - j0, 0, n);
      std::fill(row + end, row + n, kHidden);
      if (words)
        for (int64_t j = 0; j < end; ++j)
          if (!bit(words, j0 + j)) row[j] = kHidden;
    }
  }
  // Whether any of these queries and keys may not see each other.
  bool hides(int64_t i0, int64_t j0, int64_t n) const { return in.key_mask || position(i0) + 1 < j0 + n; }

  // The bits of the HR keys that a listed row sees; null = all.
  const int32_t* row_bits(int64_t listed) const {
    return in.hr_row_bits ? in.hr_row_bits + (b * in.rows + listed) * words_for_bits(in.selected) : nullptr;
  }
};

// A query row that sees HR keys, and its place in hr_rows (0 when the rows are not listed).
struct HrRow {
  int64_t query;
  int64_t listed;
};

// The rows of a sample that see HR keys, in ascending order.
inline std::vector<HrRow> hr_rows_of(const Sample& sample) {
  const AttentionInputs& in = sample.in;
  std::vector<HrRow> rows;
  if (sample.hr_keys() == 0) return rows;
  if (in.hr_rows) {
    for (int64_t r = 0; r < in.rows; ++r)
      if (const int64_t query = in.hr_rows[sample.b * in.rows + r]; query >= 0) rows.push_back({query, r});
    std::sort(rows.begin(), rows.end(), [](const HrRow& x, const HrRow& y) { return x.query < y.query; });
  } else if (in.hr_from) {
    for (int64_t query = std::max<int64_t>(in.hr_from[sample.b], 0); query < in.queries; ++query) rows.push_back({query, 0});
  }
  return rows;
}

template <typename A>
void mask_hr(A* logits, const int32_t* bits, int64_t j0, int64_t n) {
  if (!bits) return;
  for (int64_t j = 0; j < n; ++j)
    if (!bit(bits, j0 + j)) logits[j] = -std::numeric_limits<A>::infinity();
}

template <typename Function>
void dispatch(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64: return function(double());
    case DType::kFloat32: return function(float());
    case DType::kFloat16: return function(at::Half());
    case DType::kBFloat16: return function(at::BFloat16());
  }
}

}  // namespace flexattn::cpu
