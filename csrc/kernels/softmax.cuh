// The online softmax of all attention kernels. Logits are in base 2, that is, multiplied by log2(e): the GPU has an
// instruction for 2^x, and folding the factor into the scale costs nothing.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"

namespace flexattn::cuda {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Scores and weights take the instruction itself: exp2 adds three more for results below the normal numbers, which do
// not count beside a weight of 1.
__device__ inline float power_of_2(float x) { return exp2_approx(x); }
__device__ inline double power_of_2(double x) { return exp2(x); }

// softcap * tanh(logit / softcap), both in the same base; a softcap of 0 leaves the logit as it is.
template <typename A>
__device__ A cap(A logit, A softcap) {
  return softcap == A(0) ? logit : softcap * tanh(logit / softcap);
}
// The derivative of that, given its result.
template <typename A>
__device__ A slope_of_cap(A capped, A softcap) {
  if (softcap == A(0)) return A(1);
  const A t = capped / softcap;
  return A(1) - t * t;
}

// The softmax over the keys of a row seen so far. Weights, and every sum of values under them, are relative to row_max:
// whoever keeps such a sum multiplies it by what raise_max returns.
template <typename A>
struct alignas(2 * sizeof(A)) SoftmaxState {
  A row_max = minus_infinity<A>();  // of the logits, less at most the slack given to raise_max
  A row_sum = 0;                    // of 2^(logit - row_max)

  // Before any key was seen the reference is 0, since 2^(-inf - -inf) is NaN.
  __device__ A reference() const { return row_max == minus_infinity<A>() ? A(0) : row_max; }
  __device__ A weight(A logit) const { return power_of_2(logit - reference()); }

  // Raise row_max to at least `logit`, or leave it if it falls short by no more than `slack`. Return the factor that
  // brings earlier sums to the new reference.
  __device__ A raise_max(A logit, A slack = 0) {
    const A before = row_max;
    row_max = logit > before + slack ? logit : before;
    const A rescale = weight(before);
    row_sum *= rescale;
    return rescale;
  }

  // Add another set of keys, whose row_max does not exceed this one's.
  __device__ void merge(const SoftmaxState& part) { row_sum += weight(part.row_max) * part.row_sum; }

  // The average of values whose sum under the weights is `sum`; 0 for a row that sees no key.
  __device__ A average(A sum) const { return row_sum == A(0) ? A(0) : sum / row_sum; }
  __device__ A log_sum_exp() const {  // in base e
    return row_sum == A(0) ? minus_infinity<A>() : row_max * A(kLn2) + log(row_sum);
  }
};

}  // namespace flexattn::cuda
