// The arithmetic of tiles. A tile of logits is stored transposed, [keys, queries]: the queries lie side by side in the
// lanes of a vector, so that a softmax over the keys needs no sum across lanes, and only the queries have to be
// transposed. A call with few queries would leave most lanes empty; dot_rows and softmax_step_of_row work along the
// head dimension instead. Everything comes in float and double.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace flexattn::cpu {

// Dimensions that lie in lanes are padded to a multiple of this.
constexpr int64_t kLaneGroup = 16;
constexpr int64_t padded(int64_t n) { return (n + kLaneGroup - 1) / kLaneGroup * kLaneGroup; }

// c[m, n] = (accumulate ? c[m, n] : 0) + sum over k of a(m, k) b[k, n], where a(m, k) = a[m * a_row + k * a_column] and
// the rows of b and c are ldb and ldc apart. n is a multiple of kLaneGroup.
template <typename A>
void multiply(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t m,
              int64_t n, int64_t k, bool accumulate);

// logits[i] = softcap * tanh(logits[i] / softcap) for n logits; slopes[i], if wanted, is the derivative of that.
template <typename A>
void cap_logits(A* logits, int64_t n, A softcap, A* slopes);

// One step of the online softmax of `lanes` queries: turn their logits [keys, lanes] into exp(logit - row_max), and
// update each lane's row_max, row_sum and output [d, lanes]. A lane without a finite logit gives zeros.
template <typename A>
void softmax_step(A* logits, int64_t keys, int64_t lanes, A* row_max, A* row_sum, A* out, int64_t d);

// The backward pass recomputes the probabilities p = exp(logit - lse) [keys, lanes]; lse = +inf gives zeros. First add
// each lane's sum over the keys of p * dp to `expectation`.
template <typename A>
void add_expectation(const A* logits, const A* dp, int64_t keys, int64_t lanes, const A* lse, A* expectation);
// Then turn the logits into weight * p, and dp into the gradient of the logits, p * (weight * dp - expectation).
template <typename A>
void logit_gradients(A* logits, A* dp, int64_t keys, int64_t lanes, const A* lse, const A* weight,
                     const A* expectation);

// softmax_step for a single query with dense logits [keys] and output [d], which also adds the values under the new
// weights to the output. Row j of the values is values[j * ld].
template <typename A>
void softmax_step_of_row(A* logits, int64_t keys, A* row_max, A* row_sum, A* out, const A* values, int64_t ld,
                         int64_t d);

// out[j] = x . rows[j * ld] for n rows of d elements.
template <typename A>
void dot_rows(const A* x, const A* rows, int64_t ld, int64_t n, int64_t d, A* out);

// x[j] = exp(x[j] - shift), where exp(-inf) = 0.
template <typename A>
void exp_shifted(A* x, int64_t n, A shift);

// to[i * d + c] = from[row(i) * stride + c] as accumulator values; row(i) = index ? index[i] : i.
template <typename T, typename A>
void widen_rows(const T* from, int64_t stride, const int32_t* index, int64_t rows, int64_t d, A* to);

}  // namespace flexattn::cpu
