// The instructions of csrc/kernels/ptx.cuh, lane by lane, with the fragment layouts of the PTX manual. Sums are in
// float32, one product after the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>
#include <type_traits>

#include "memory_checks.h"

namespace flexattn::cuda {
namespace simt_ptx {

// Accesses registers alone: need not be watched.
#define FLEXATTN_UNWATCHED __attribute__((no_sanitize("thread")))

// A lane's elements of a, then of b, on their way to all lanes: widened once, by the lane that holds them.
template <typename T, int a_words, int b_words>
FLEXATTN_UNWATCHED const simt::WarpBytes& exchange_widened(const char* name, const uint32_t (&a)[a_words],
                                                           const uint32_t (&b)[b_words]) {
  constexpr int n = 2 * (a_words + b_words);
  T elements[n];
  std::memcpy(elements, a, sizeof a);
  std::memcpy(elements + 2 * a_words, b, sizeof b);
  float mine[n];
  for (int i = 0; i < n; ++i) mine[i] = static_cast<float>(elements[i]);
  return simt::exchange(name, mine, sizeof mine);
}
FLEXATTN_UNWATCHED inline float element(const simt::WarpBytes& lanes, int lane, int index) {
  float value;
  std::memcpy(&value, lanes[lane] + index * sizeof value, sizeof value);
  return value;
}

// A quad-pair is the lanes q .. q + 3 and q + 16 .. q + 19; rows and columns 0..3 belong to the former, 4..7 to the
// latter.
inline int in_quad_pair(int quad_pair, int row) { return 4 * quad_pair + row % 4 + 16 * (row / 4); }

template <bool row_major_b>
FLEXATTN_UNWATCHED void mma_m8n8k4(const char* name, float (&d)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  const simt::WarpBytes& lanes = exchange_widened<__half>(name, a, b);
  const int lane = simt::lane(), quad_pair = lane / 4 % 4;
  for (int i = 0; i < 8; ++i) {
    const int row = 4 * (lane / 16) + (i & 2) + (lane & 1), column = (i & 4) + (lane & 2) + (i & 1);
    for (int k = 0; k < 4; ++k) {
      const float x = element(lanes, in_quad_pair(quad_pair, row), k);
      const float y = row_major_b ? element(lanes, in_quad_pair(quad_pair, k + column / 4 * 4), 4 + column % 4)
                                  : element(lanes, in_quad_pair(quad_pair, column), 4 + k);
      d[i] += x * y;
    }
  }
}

template <bool transposed>
void ldmatrix_x4(const char* name, uint32_t (&r)[4], const void* row) {
  simt::require_alignment("ldmatrix of", row, 16);
  simt::record_access(row, 16, simt::Access::kReadByOthers);
  const simt::WarpBytes& lanes = simt::exchange(name, &row, sizeof row);
  const int lane = simt::lane();
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int i = 0; i < 2; ++i) {
      const int across = lane % 4 * 2 + i, down = lane / 4;
      const unsigned char* from;
      std::memcpy(&from, lanes[8 * matrix + (transposed ? across : down)], sizeof from);
      std::memcpy(reinterpret_cast<unsigned char*>(&r[matrix]) + 2 * i, from + 2 * (transposed ? down : across), 2);
    }
}

}  // namespace simt_ptx

inline int opaque(int x) { return x; }
template <typename T>
const T* row_in_global(const T* rows, int n, int bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(rows) + static_cast<int64_t>(n) * bytes);
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.f : y;
}

inline void mma_m8n8k4(float (&d)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  simt_ptx::mma_m8n8k4<false>("mma.m8n8k4", d, a, b);
}
inline void mma_m8n8k4_row_row(float (&d)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  simt_ptx::mma_m8n8k4<true>("mma.m8n8k4.row.row", d, a, b);
}

template <typename T>
FLEXATTN_UNWATCHED void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const simt::WarpBytes& lanes = simt_ptx::exchange_widened<T>("mma.m16n8k16", a, b);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      d[i] += simt_ptx::element(lanes, row % 8 * 4 + k % 8 / 2, 2 * (row / 8 + 2 * (k / 8)) + k % 2) *
              simt_ptx::element(lanes, column * 4 + k % 8 / 2, 8 + 2 * (k / 8) + k % 2);
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt_ptx::ldmatrix_x4<false>("ldmatrix", r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  simt_ptx::ldmatrix_x4<true>("ldmatrix.trans", r, row);
}

inline void cp_async_16(void* shared, const void* global) { simt::start_copy(shared, global); }
inline void cp_async_commit() { simt::commit_copies(); }
template <int n>
void cp_async_wait() {
  simt::wait_copies(n);
}

}  // namespace flexattn::cuda
