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

template <typename T>
float element(const simt::WarpBytes& lanes, int lane, int index) {
  T value;
  std::memcpy(&value, lanes[lane] + index * sizeof(T), sizeof(T));
  return static_cast<float>(value);
}

// A quad-pair is the lanes q .. q + 3 and q + 16 .. q + 19; rows and columns 0..3 belong to the former, 4..7 to the
// latter.
inline int in_quad_pair(int quad_pair, int row) { return 4 * quad_pair + row % 4 + 16 * (row / 4); }

template <bool row_major_b>
void mma_m8n8k4(const char* name, float (&d)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  const uint32_t mine[4] = {a[0], a[1], b[0], b[1]};
  const simt::WarpBytes& lanes = simt::exchange(name, mine, sizeof mine);
  const int lane = simt::lane(), quad_pair = lane / 4 % 4;
  for (int i = 0; i < 8; ++i) {
    const int row = 4 * (lane / 16) + (i & 2) + (lane & 1), column = (i & 4) + (lane & 2) + (i & 1);
    for (int k = 0; k < 4; ++k) {
      const float x = element<__half>(lanes, in_quad_pair(quad_pair, row), k);
      const float y = row_major_b ? element<__half>(lanes, in_quad_pair(quad_pair, k + column / 4 * 4), 4 + column % 4)
                                  : element<__half>(lanes, in_quad_pair(quad_pair, column), 4 + k);
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
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const simt::WarpBytes& lanes = simt::exchange("mma.m16n8k16", mine, sizeof mine);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      d[i] += simt_ptx::element<T>(lanes, row % 8 * 4 + k % 8 / 2, 2 * (row / 8 + 2 * (k / 8)) + k % 2) *
              simt_ptx::element<T>(lanes, column * 4 + k % 8 / 2, 8 + 2 * (k / 8) + k % 2);
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
