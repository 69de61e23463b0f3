// Project new high-resolution tokens to keys and values, rotate the keys, and write both into their slots of the pool.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct ProjectHrKvParams {
  DType dtype;           // of features, weights, biases and the pool; a projection is rounded to it before the rotation
  DType table_dtype;     // of cos and sin: dtype or float32
  int64_t tokens;        // T
  int64_t channels;      // D
  int64_t heads;         // Hkv
  int64_t head_dim;      // d, even
  int64_t pool;          // P
  int64_t rows;          // M: room in new_tokens and new_slots
  const int32_t* count;  // [1]: only the first of them are read
  const int32_t* new_tokens;  // [M]: a token in [0, T)
  const int32_t* new_slots;   // [M]: its slot in [0, P); no slot twice

  // Dense.
  const void* features;  // [T, D]
  const void* cos;       // [T, d]: x = (x1, x2) in halves of d/2 becomes x * cos + (-x2, x1) * sin, as in Llama
  const void* sin;
  const void* k_weight;  // [Hkv * d, D]: k[g, c] = sum over i of k_weight[g * d + c, i] * features[token, i]
  const void* v_weight;
  const void* k_bias;  // [Hkv * d] or null
  const void* v_bias;

  // x[p, g, c] = data[p * row + g * head + c]; .batch unused
  void* k_pool;  // [P, Hkv, d]
  void* v_pool;
  Strides k_pool_strides, v_pool_strides;
};

namespace cpu {
void project_hr_kv(const ProjectHrKvParams& params, Stream stream);
}
namespace cuda {
void project_hr_kv(const ProjectHrKvParams& params, Stream stream);
}

}  // namespace flexattn
