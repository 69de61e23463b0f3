// The few vector loops of the CPU kernels that no BLAS call covers. Float versions are compiled for several instruction
// sets and chosen at load time; double, used in tests, takes the plain ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace flexattn::cpu {

// out[j] = scale * (x . rows[j]) for n rows of d elements, ld apart.
void dot_rows(const float* x, const float* rows, int64_t ld, int64_t n, int64_t d, float scale, float* out);

// out[c] += sum over j of weight[j] * rows[j][c].
void add_weighted_rows(const float* weight, const float* rows, int64_t ld, int64_t n, int64_t d, float* out);

// x[j] = exp(x[j] - shift), where exp(-inf) = 0; returns their sum.
float exp_and_sum(float* x, int64_t n, float shift);

float max_of(const float* x, int64_t n);

inline void dot_rows(const double* x, const double* rows, int64_t ld, int64_t n, int64_t d, double scale, double* out) {
  for (int64_t j = 0; j < n; ++j) {
    double sum = 0;
    for (int64_t c = 0; c < d; ++c) sum += x[c] * rows[j * ld + c];
    out[j] = scale * sum;
  }
}

inline void add_weighted_rows(const double* weight, const double* rows, int64_t ld, int64_t n, int64_t d, double* out) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < d; ++c) out[c] += weight[j] * rows[j * ld + c];
}

inline double exp_and_sum(double* x, int64_t n, double shift) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += x[j] = std::exp(x[j] - shift);
  return sum;
}

inline double max_of(const double* x, int64_t n) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, x[j]);
  return largest;
}

}  // namespace flexattn::cpu
