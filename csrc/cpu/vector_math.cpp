#include "vector_math.h"

#include <cstring>

// One source, several instruction sets: the loader picks the best version that the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FLEXATTN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLEXATTN_MULTIVERSION
#endif

namespace flexattn::cpu {
namespace {

// Sums are kept in this many lanes, so that the order of additions, and the result, is the same on every processor.
constexpr int64_t kLanes = 16;

inline __attribute__((always_inline)) float sum_lanes(const float* lanes) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// exp for x <= 0, relative error below 2e-7: 2^n * 2^f with n the nearest integer to x * log2(e), and 2^f by its Taylor
// polynomial on |f| <= 1/2. Below -87 the result is 0, which also holds for -inf.
inline __attribute__((always_inline)) float exp_of_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = clamped * 1.44269504f + shifter;
  const float n = shifted - shifter;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln 2, in two parts
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t power_bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &power_bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

}  // namespace

FLEXATTN_MULTIVERSION
void dot_rows(const float* x, const float* rows, int64_t ld, int64_t n, int64_t d, float scale, float* out) {
  for (int64_t j = 0; j < n; ++j) {
    const float* row = rows + j * ld;
    float lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] += x[c + i] * row[c + i];
    for (; c < d; ++c) lanes[c % kLanes] += x[c] * row[c];
    out[j] = scale * sum_lanes(lanes);
  }
}

FLEXATTN_MULTIVERSION
void add_weighted_rows(const float* weight, const float* rows, int64_t ld, int64_t n, int64_t d, float* out) {
  for (int64_t j = 0; j < n; ++j) {
    const float w = weight[j];
    const float* row = rows + j * ld;
    for (int64_t c = 0; c < d; ++c) out[c] += w * row[c];
  }
}

FLEXATTN_MULTIVERSION
float exp_and_sum(float* x, int64_t n, float shift) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += x[j + i] = exp_of_nonpositive(x[j + i] - shift);
  for (; j < n; ++j) lanes[j % kLanes] += x[j] = exp_of_nonpositive(x[j] - shift);
  return sum_lanes(lanes);
}

FLEXATTN_MULTIVERSION
float max_of(const float* x, int64_t n) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = -std::numeric_limits<float>::infinity();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = lanes[i] > x[j + i] ? lanes[i] : x[j + i];
  for (; j < n; ++j) lanes[0] = lanes[0] > x[j] ? lanes[0] : x[j];
  float largest = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) largest = largest > lanes[i] ? largest : lanes[i];
  return largest;
}

}  // namespace flexattn::cpu
