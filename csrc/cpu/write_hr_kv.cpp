#include "flexattn/write_hr_kv.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "storage.h"

namespace flexattn::cpu {
namespace {

// T: keys and values, C: cos and sin.
template <typename T, typename C>
void write_row(const WriteHrKvParams& p, int64_t m) {
  using A = typename Accumulator<T>::type;
  const int64_t slot = p.slots[m], half = p.head_dim / 2;
  if (slot < 0) return;
  const C* cos = static_cast<const C*>(p.cos) + m * p.cos_row;
  const C* sin = static_cast<const C*>(p.sin) + m * p.sin_row;
  for (int64_t g = 0; g < p.heads; ++g) {
    const T* k = static_cast<const T*>(p.k) + m * p.k_strides.row + g * p.k_strides.head;
    const T* v = static_cast<const T*>(p.v) + m * p.v_strides.row + g * p.v_strides.head;
    T* rotated = static_cast<T*>(p.k_pool) + slot * p.k_pool_strides.row + g * p.k_pool_strides.head;
    for (int64_t c = 0; c < half; ++c) {
      const A x1 = static_cast<A>(k[c]), x2 = static_cast<A>(k[c + half]);
      rotated[c] = static_cast<T>(x1 * static_cast<A>(cos[c]) - x2 * static_cast<A>(sin[c]));
      rotated[c + half] = static_cast<T>(x2 * static_cast<A>(cos[c + half]) + x1 * static_cast<A>(sin[c + half]));
    }
    std::copy_n(v, p.head_dim, static_cast<T*>(p.v_pool) + slot * p.v_pool_strides.row + g * p.v_pool_strides.head);
  }
}

}  // namespace

void write_hr_kv(const WriteHrKvParams& params, Stream) {
  dispatch(params.dtype, [&](auto value) {
    using T = decltype(value);
    at::parallel_for(0, params.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        params.table_dtype == params.dtype ? write_row<T, T>(params, m) : write_row<T, float>(params, m);
    });
  });
}

}  // namespace flexattn::cpu
