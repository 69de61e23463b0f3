// Write new high-resolution keys, rotated, and values into their slots of the pool.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct WriteHrKvParams {
  DType dtype;           // of k, v and the pool; the rotation runs in float32 (float64 for float64) and is rounded once
  DType table_dtype;     // of cos and sin: dtype or float32
  int64_t rows;          // M
  int64_t heads;         // Hkv
  int64_t head_dim;      // d, even
  int64_t pool;          // P
  const int32_t* slots;  // [M] dense: a slot in [0, P), or -1 to skip the row; no slot twice

  // x[m, g, c] = data[m * row + g * head + c]; .batch unused
  const void* k;  // [M, Hkv, d]
  const void* v;
  void* k_pool;  // [P, Hkv, d]
  void* v_pool;
  Strides k_strides, v_strides, k_pool_strides, v_pool_strides;

  // x = (x1, x2) in halves of d/2 becomes x * cos + (-x2, x1) * sin, as in Llama.
  const void* cos;  // [M, d]: cos[m, c] = data[m * cos_row + c]
  const void* sin;
  int64_t cos_row, sin_row;
};

namespace cpu {
void write_hr_kv(const WriteHrKvParams& params, Stream stream);
}
namespace cuda {
void write_hr_kv(const WriteHrKvParams& params, Stream stream);
}

}  // namespace flexattn
