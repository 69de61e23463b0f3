// Machine instructions that CUDA C++ has no name for, one function each. Fragment layouts: mma_volta.cuh,
// mma_ampere.cuh.
#pragma once

#ifdef FLEXATTN_SIMT
#include "ptx.h"  // the same functions, lane by lane on the CPU
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flexattn::cuda {

// x, hidden from the compiler: what is derived from it is computed where it is used instead of being kept in registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Row n of rows in global memory that are `bytes` apart, in one instruction; C++ takes three where it loses sight of
// the 32 bits, and generic loads where it does of the memory.
template <typename T>
__device__ __forceinline__ const T* row_in_global(const T* rows, int n, int bytes) {
  size_t offset;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(n), "r"(bytes));
  return static_cast<const T*>(__cvta_global_to_generic(__cvta_generic_to_global(rows) + offset));
}

// 2^x in one instruction, 2 ulp; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d += a b for four independent 8x8x4 products, one per quad-pair of the warp. a: row-major; b: column-major.
__device__ __forceinline__ void mma_m8n8k4(float (&d)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
      "{%0,%1,%2,%3,%4,%5,%6,%7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}

// The same with a row-major b.
__device__ __forceinline__ void mma_m8n8k4_row_row(float (&d)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
      "{%0,%1,%2,%3,%4,%5,%6,%7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}

// What follows takes sm_80. For older GPUs it compiles to a trap; attention_path.h never launches it there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FLEXATTN_ASM_SM80 asm volatile
#else
#define FLEXATTN_ASM_SM80(...) __trap()
#endif

// clang-format off: it does not recognise the operands of asm inside a macro

// d += a b, 16x8x16, for __half or __nv_bfloat16. a: row-major; b: column-major.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    FLEXATTN_ASM_SM80(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    FLEXATTN_ASM_SM80(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Load four 8x8 matrices of 16-bit elements. Lane l brings the address of row l % 8 of matrix l / 8: 16 aligned bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  FLEXATTN_ASM_SM80(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  FLEXATTN_ASM_SM80(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Copy 16 bytes from global to shared memory. They have arrived once cp_async_wait returns.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  FLEXATTN_ASM_SM80(
      "cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  FLEXATTN_ASM_SM80("cp.async.commit_group;" : : : "memory");
}
template <int n>
__device__ __forceinline__ void cp_async_wait() {
  FLEXATTN_ASM_SM80("cp.async.wait_group %0;" : : "n"(n) : "memory");
}
// clang-format on

}  // namespace flexattn::cuda
#endif
