#include "vector_math.h"

#include <cmath>
#include <limits>

#include "simd.h"

namespace flexattn::cpu {
namespace {

// ------------------------------------------------------------------------------------------------------ exponential

// exp(x) for x <= 0, relative error below 2e-7: 2^n * 2^f with n the integer nearest to x * log2(e), and 2^f by its
// Taylor polynomial on |f| <= 1/2. The result is 0 below -87, so for -inf too; NaN stays NaN.
template <class M>
FLEXATTN_INLINE Vector<float, M> exp_of_nonpositive(Vector<float, M> x) {
  using V = Vector<float, M>;
  using I = Vector<int32_t, M>;
  const I visible = ~(x < -87.0f);
  x = (V)((I)x & visible);              // 0 instead of what is too small
  const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V shifted = x * 1.44269504f + shifter;
  const V n = shifted - shifter;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln 2, in two parts
  V p = V{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const V power = (V)(((I)shifted + 127) << 23);
  return (V)((I)(p * power) & visible);
}

template <class M>
FLEXATTN_INLINE Vector<double, M> exp_of_nonpositive(Vector<double, M> x) {
  Vector<double, M> y;
  for (int i = 0; i < VectorOf<double, M>::lanes; ++i) y[i] = std::exp(x[i]);
  return y;
}

// tanh(x), relative error below 3e-7: an odd polynomial (Cephes) near 0, where 1 - e^-2x would cancel.
template <class M>
FLEXATTN_INLINE Vector<float, M> tanh_of(Vector<float, M> x) {
  using V = Vector<float, M>;
  const V size = x < 0 ? -x : x, e = exp_of_nonpositive<M>(-2.0f * size), far = (1.0f - e) / (1.0f + e), z = x * x;
  V p = V{} - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return size < 0.625f ? p * z * x + x : x < 0 ? -far : far;
}

template <class M>
FLEXATTN_INLINE Vector<double, M> tanh_of(Vector<double, M> x) {
  Vector<double, M> y;
  for (int i = 0; i < VectorOf<double, M>::lanes; ++i) y[i] = std::tanh(x[i]);
  return y;
}

template <class V>
FLEXATTN_INLINE V max_of(V x, V y) {
  return x > y ? x : y;
}

// What is subtracted before the exponential: row_max, or 0 if no key was seen, since -inf - -inf is NaN.
template <typename A, class V>
FLEXATTN_INLINE V reference_of(V row_max) {
  const V nothing = V{} - std::numeric_limits<A>::infinity();
  return row_max == nothing ? V{} : row_max;
}

// -------------------------------------------------------------------------------------------------------- products

// A block of `rows` x `width` vectors of c that stays in registers while k runs.
template <class M, int rows, int width, typename A>
FLEXATTN_INLINE void multiply_block(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c,
                                    int64_t ldc, int64_t k, bool accumulate) {
  using V = Vector<A, M>;
  constexpr int lanes = VectorOf<A, M>::lanes;
  V sum[rows][width];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < width; ++j) sum[i][j] = accumulate ? load<M>(c + i * ldc + j * lanes) : V{};
  for (int64_t l = 0; l < k; ++l) {
    V row[width];
    for (int j = 0; j < width; ++j) row[j] = load<M>(b + l * ldb + j * lanes);
    for (int i = 0; i < rows; ++i) {
      const V factor = V{} + a[i * a_row + l * a_column];
      for (int j = 0; j < width; ++j) sum[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < width; ++j) store<M>(c + i * ldc + j * lanes, sum[i][j]);
}

template <class M, int width, typename A>
FLEXATTN_INLINE void multiply_column(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c,
                                     int64_t ldc, int64_t m, int64_t k, bool accumulate) {
  int64_t i = 0;
  for (; i + M::height <= m; i += M::height)
    multiply_block<M, M::height, width>(a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc, k, accumulate);
  for (; i < m; ++i)
    multiply_block<M, 1, width>(a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc, k, accumulate);
}

struct Multiply {
  template <class M, typename A>
  static FLEXATTN_INLINE void run(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c,
                                  int64_t ldc, int64_t m, int64_t n, int64_t k, bool accumulate) {
    constexpr int64_t lanes = VectorOf<A, M>::lanes, wide = lanes * M::width;
    int64_t j = 0;
    for (; j + wide <= n; j += wide)
      multiply_column<M, M::width>(a, a_row, a_column, b + j, ldb, c + j, ldc, m, k, accumulate);
    for (; j < n; j += lanes) multiply_column<M, 1>(a, a_row, a_column, b + j, ldb, c + j, ldc, m, k, accumulate);
  }
};

// Rows are prefetched this many ahead: a row may be far from the one before, and hardware prefetches within a page.
constexpr int64_t kRowsAhead = 12;
template <typename A>
FLEXATTN_INLINE void prefetch_row(const A* row, int64_t d) {
  for (int64_t byte = 0; byte < d * static_cast<int64_t>(sizeof(A)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

template <class M, typename A>
FLEXATTN_INLINE A sum_of_lanes(Vector<A, M> x) {
  A sum = 0;
  for (int i = 0; i < VectorOf<A, M>::lanes; ++i) sum += x[i];
  return sum;
}

// Four rows at a time, for four independent sums.
struct DotRows {
  template <class M, int rows, typename A>
  static FLEXATTN_INLINE void some(const A* x, const A* y, int64_t ld, int64_t d, A* out) {
    constexpr int64_t lanes = VectorOf<A, M>::lanes;
    Vector<A, M> sum[rows] = {};
    A tail[rows] = {};
    int64_t c = 0;
    for (; c + lanes <= d; c += lanes)
      for (int i = 0; i < rows; ++i) sum[i] += load<M>(x + c) * load<M>(y + i * ld + c);
    for (; c < d; ++c)
      for (int i = 0; i < rows; ++i) tail[i] += x[c] * y[i * ld + c];
    for (int i = 0; i < rows; ++i) out[i] = tail[i] + sum_of_lanes<M, A>(sum[i]);
  }
  template <class M, typename A>
  static FLEXATTN_INLINE void run(const A* x, const A* y, int64_t ld, int64_t n, int64_t d, A* out) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
      for (int64_t i = j; i < j + 4; ++i)
        if (i + kRowsAhead < n) prefetch_row(y + (i + kRowsAhead) * ld, d);
      some<M, 4>(x, y + j * ld, ld, d, out + j);
    }
    for (; j < n; ++j) some<M, 1>(x, y + j * ld, ld, d, out + j);
  }
};

// --------------------------------------------------------------------------------------------------------- softmax

struct CapLogits {
  template <class M, typename A>
  static FLEXATTN_INLINE void some(A* logits, A softcap, A* slopes) {
    const Vector<A, M> t = tanh_of<M>(load<M>(logits) / softcap);
    store<M>(logits, softcap * t);
    if (slopes) store<M>(slopes, A(1) - t * t);
  }
  template <class M, typename A>
  static FLEXATTN_INLINE void run(A* logits, int64_t n, A softcap, A* slopes) {
    constexpr int64_t lanes = VectorOf<A, M>::lanes;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) some<M>(logits + i, softcap, slopes ? slopes + i : nullptr);
    if (i == n) return;
    A rest[lanes] = {}, rest_slopes[lanes];
    std::memcpy(rest, logits + i, (n - i) * sizeof(A));
    some<M>(rest, softcap, rest_slopes);
    std::memcpy(logits + i, rest, (n - i) * sizeof(A));
    if (slopes) std::memcpy(slopes + i, rest_slopes, (n - i) * sizeof(A));
  }
};

struct SoftmaxStep {
  template <class M, typename A>
  static FLEXATTN_INLINE void run(A* logits, int64_t keys, int64_t lanes, A* row_max, A* row_sum, A* out, int64_t d) {
    using V = Vector<A, M>;
    for (int64_t i = 0; i < lanes; i += VectorOf<A, M>::lanes) {
      const V before = load<M>(row_max + i);
      V after = before;
      for (int64_t j = 0; j < keys; ++j) after = max_of(after, load<M>(logits + j * lanes + i));
      const V reference = reference_of<A>(after), rescale = exp_of_nonpositive<M>(before - reference);
      V total = load<M>(row_sum + i) * rescale;
      for (int64_t j = 0; j < keys; ++j) {
        const V p = exp_of_nonpositive<M>(load<M>(logits + j * lanes + i) - reference);
        total += p;
        store<M>(logits + j * lanes + i, p);
      }
      for (int64_t c = 0; c < d; ++c) store<M>(out + c * lanes + i, load<M>(out + c * lanes + i) * rescale);
      store<M>(row_max + i, after);
      store<M>(row_sum + i, total);
    }
  }
};

struct AddExpectation {
  template <class M, typename A>
  static FLEXATTN_INLINE void run(const A* logits, const A* dp, int64_t keys, int64_t lanes, const A* lse,
                                  A* expectation) {
    for (int64_t i = 0; i < lanes; i += VectorOf<A, M>::lanes) {
      const Vector<A, M> shift = load<M>(lse + i);
      Vector<A, M> sum = load<M>(expectation + i);
      for (int64_t j = i; j < keys * lanes; j += lanes)
        sum += exp_of_nonpositive<M>(load<M>(logits + j) - shift) * load<M>(dp + j);
      store<M>(expectation + i, sum);
    }
  }
};

struct LogitGradients {
  template <class M, typename A>
  static FLEXATTN_INLINE void run(A* logits, A* dp, int64_t keys, int64_t lanes, const A* lse, const A* weight,
                                  const A* expectation) {
    for (int64_t i = 0; i < lanes; i += VectorOf<A, M>::lanes) {
      const Vector<A, M> shift = load<M>(lse + i), w = load<M>(weight + i), mean = load<M>(expectation + i);
      for (int64_t j = i; j < keys * lanes; j += lanes) {
        const Vector<A, M> p = exp_of_nonpositive<M>(load<M>(logits + j) - shift);
        store<M>(logits + j, w * p);
        store<M>(dp + j, p * (w * load<M>(dp + j) - mean));
      }
    }
  }
};

struct ExpShifted {
  template <class M, typename A>
  static FLEXATTN_INLINE void run(A* x, int64_t n, A shift) {
    constexpr int64_t lanes = VectorOf<A, M>::lanes;
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) store<M>(x + j, exp_of_nonpositive<M>(load<M>(x + j) - shift));
    if (j == n) return;
    A rest[lanes] = {};
    std::memcpy(rest, x + j, (n - j) * sizeof(A));
    store<M>(rest, exp_of_nonpositive<M>(load<M>(rest) - shift));
    std::memcpy(x + j, rest, (n - j) * sizeof(A));
  }
};

// out[0 .. width vectors) += sum over j of weight[j] * rows[j]
template <class M, int width, typename A>
FLEXATTN_INLINE void add_weighted(const A* weight, const A* rows, int64_t ld, int64_t n, A* out) {
  constexpr int64_t lanes = VectorOf<A, M>::lanes;
  Vector<A, M> sum[width];
  for (int v = 0; v < width; ++v) sum[v] = load<M>(out + v * lanes);
  for (int64_t j = 0; j < n; ++j) {
    if (j + kRowsAhead < n) prefetch_row(rows + (j + kRowsAhead) * ld, width * lanes);
    const Vector<A, M> w = Vector<A, M>{} + weight[j];
    for (int v = 0; v < width; ++v) sum[v] += w * load<M>(rows + j * ld + v * lanes);
  }
  for (int v = 0; v < width; ++v) store<M>(out + v * lanes, sum[v]);
}

// The max of x and n logits.
template <class M, typename A>
FLEXATTN_INLINE A max_of_row(const A* logits, int64_t n, A x) {
  constexpr int64_t lanes = VectorOf<A, M>::lanes;
  Vector<A, M> of_lanes = Vector<A, M>{} + x;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) of_lanes = max_of(of_lanes, load<M>(logits + j));
  for (int64_t i = 0; i < lanes; ++i) x = max_of(x, A(of_lanes[i]));
  for (; j < n; ++j) x = max_of(x, logits[j]);
  return x;
}

struct SoftmaxStepOfRow {
  template <class M, typename A>
  static FLEXATTN_INLINE void run(A* logits, int64_t keys, A* row_max, A* row_sum, A* out, const A* values, int64_t ld,
                                  int64_t d) {
    constexpr int64_t lanes = VectorOf<A, M>::lanes;
    const A after = max_of_row<M>(logits, keys, *row_max);
    if (after == -std::numeric_limits<A>::infinity()) return;  // no key seen so far
    if (after > *row_max) {
      const A rescale = std::exp(*row_max - after);
      *row_sum *= rescale;
      for (int64_t c = 0; c < d; ++c) out[c] *= rescale;
      *row_max = after;
    }
    ExpShifted::run<M>(logits, keys, after);
    int64_t j = 0;
    Vector<A, M> total = {};
    for (; j + lanes <= keys; j += lanes) total += load<M>(logits + j);
    A rest = sum_of_lanes<M, A>(total);
    for (; j < keys; ++j) rest += logits[j];
    *row_sum += rest;

    int64_t c = 0;
    for (; c + 4 * lanes <= d; c += 4 * lanes) add_weighted<M, 4>(logits, values + c, ld, keys, out + c);
    for (; c + lanes <= d; c += lanes) add_weighted<M, 1>(logits, values + c, ld, keys, out + c);
    for (; c < d; ++c)
      for (j = 0; j < keys; ++j) out[c] += logits[j] * values[j * ld + c];
  }
};

// ---------------------------------------------------------------------------------------------------------- widening

FLEXATTN_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FLEXATTN_INLINE float widen(float x) { return x; }
FLEXATTN_INLINE double widen(double x) { return x; }
FLEXATTN_INLINE float widen(c10::BFloat16 x) { return from_bits(static_cast<uint32_t>(x.x) << 16); }
// Shift exponent and fraction into position; the product corrects the bias of the exponent, of subnormals too.
FLEXATTN_INLINE float widen(c10::Half x) {
  const uint32_t bits = static_cast<uint32_t>(x.x), magnitude = bits & 0x7fffu;
  const float finite = from_bits(magnitude << 13) * 0x1p112f;
  uint32_t result;
  std::memcpy(&result, &finite, sizeof result);
  result |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return from_bits(result | (bits & 0x8000u) << 16);
}

struct WidenRows {
  template <class M, typename T, typename A>
  static FLEXATTN_INLINE void run(const T* from, int64_t stride, const int32_t* index, int64_t rows, int64_t d, A* to) {
    const auto row = [=](int64_t i) __attribute__((always_inline)) { return from + (index ? index[i] : i) * stride; };
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kRowsAhead < rows) prefetch_row(row(i + kRowsAhead), d);
      const T* __restrict__ source = row(i);
      A* __restrict__ target = to + i * d;
      for (int64_t c = 0; c < d; ++c) target[c] = widen(source[c]);
    }
  }
};

}  // namespace

template <typename A>
void multiply(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t m,
              int64_t n, int64_t k, bool accumulate) {
  run_best<Multiply>(a, a_row, a_column, b, ldb, c, ldc, m, n, k, accumulate);
}
template <typename A>
void cap_logits(A* logits, int64_t n, A softcap, A* slopes) {
  run_best<CapLogits>(logits, n, softcap, slopes);
}
template <typename A>
void softmax_step(A* logits, int64_t keys, int64_t lanes, A* row_max, A* row_sum, A* out, int64_t d) {
  run_best<SoftmaxStep>(logits, keys, lanes, row_max, row_sum, out, d);
}
template <typename A>
void add_expectation(const A* logits, const A* dp, int64_t keys, int64_t lanes, const A* lse, A* expectation) {
  run_best<AddExpectation>(logits, dp, keys, lanes, lse, expectation);
}
template <typename A>
void logit_gradients(A* logits, A* dp, int64_t keys, int64_t lanes, const A* lse, const A* weight,
                     const A* expectation) {
  run_best<LogitGradients>(logits, dp, keys, lanes, lse, weight, expectation);
}
template <typename A>
void softmax_step_of_row(A* logits, int64_t keys, A* row_max, A* row_sum, A* out, const A* values, int64_t ld,
                         int64_t d) {
  run_best<SoftmaxStepOfRow>(logits, keys, row_max, row_sum, out, values, ld, d);
}
template <typename A>
void dot_rows(const A* x, const A* rows, int64_t ld, int64_t n, int64_t d, A* out) {
  run_best<DotRows>(x, rows, ld, n, d, out);
}
template <typename A>
void exp_shifted(A* x, int64_t n, A shift) {
  run_best<ExpShifted>(x, n, shift);
}
template <typename T, typename A>
void widen_rows(const T* from, int64_t stride, const int32_t* index, int64_t rows, int64_t d, A* to) {
  run_best<WidenRows>(from, stride, index, rows, d, to);
}

#define FLEXATTN_INSTANTIATE(A)                                                                                        \
  template void multiply(const A*, int64_t, int64_t, const A*, int64_t, A*, int64_t, int64_t, int64_t, int64_t, bool); \
  template void cap_logits(A*, int64_t, A, A*);                                                                        \
  template void softmax_step(A*, int64_t, int64_t, A*, A*, A*, int64_t);                                               \
  template void add_expectation(const A*, const A*, int64_t, int64_t, const A*, A*);                                   \
  template void logit_gradients(A*, A*, int64_t, int64_t, const A*, const A*, const A*);                               \
  template void softmax_step_of_row(A*, int64_t, A*, A*, A*, const A*, int64_t, int64_t);                              \
  template void dot_rows(const A*, const A*, int64_t, int64_t, int64_t, A*);                                           \
  template void exp_shifted(A*, int64_t, A);                                                                           \
  template void widen_rows(const A*, int64_t, const int32_t*, int64_t, int64_t, A*)
FLEXATTN_INSTANTIATE(float);
FLEXATTN_INSTANTIATE(double);
template void widen_rows(const c10::BFloat16*, int64_t, const int32_t*, int64_t, int64_t, float*);
template void widen_rows(const c10::Half*, int64_t, const int32_t*, int64_t, int64_t, float*);

}  // namespace flexattn::cpu
