// A block per new token; its threads share the heads and channels. A thread holds a piece of each half of a head, since
// the rotation mixes them: 16 bytes each where addresses, strides and d allow, else one element.

#include "flexattn/write_hr_kv.h"
#include "launch.cuh"
#include "numeric.cuh"
#include "require.cuh"
#include "vector.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 128;

// T: keys and values, C: cos and sin; N: elements of a piece.
template <typename T, typename C, int N>
__global__ void __launch_bounds__(kThreads) rotate_and_write(WriteHrKvParams p) {
  using A = typename Accumulator<T>::type;
  const int64_t row = blockIdx.x, slot = p.slots[row];
  require("write_hr_kv: slots", slot, -1, p.pool - 1);
  if (slot < 0) return;
  const int half = static_cast<int>(p.head_dim / 2), pieces = half / N, work = static_cast<int>(p.heads) * pieces;
  const C* cos = static_cast<const C*>(p.cos) + row * p.cos_row;
  const C* sin = static_cast<const C*>(p.sin) + row * p.sin_row;
  for (int i = threadIdx.x; i < work; i += kThreads) {
    const int head = i / pieces, c = i % pieces * N;
    const auto offset = [&](const Strides& s, int64_t index) { return index * s.row + head * s.head + c; };
    const T* k = static_cast<const T*>(p.k) + offset(p.k_strides, row);
    const T* v = static_cast<const T*>(p.v) + offset(p.v_strides, row);
    T* k_slot = static_cast<T*>(p.k_pool) + offset(p.k_pool_strides, slot);
    T* v_slot = static_cast<T*>(p.v_pool) + offset(p.v_pool_strides, slot);

    const auto x1 = load<N>(k), x2 = load<N>(k + half), v1 = load<N>(v), v2 = load<N>(v + half);
    const auto cos1 = load<N>(cos + c), cos2 = load<N>(cos + c + half), sin1 = load<N>(sin + c),
               sin2 = load<N>(sin + c + half);
    Vector<T, N> r1, r2;
    for (int j = 0; j < N; ++j) {
      const auto at = [j](const auto& vector) { return static_cast<A>(widen(vector.element[j])); };
      r1.element[j] = narrow<T>(at(x1) * at(cos1) - at(x2) * at(sin1));
      r2.element[j] = narrow<T>(at(x2) * at(cos2) + at(x1) * at(sin2));
    }
    store(k_slot, r1), store(k_slot + half, r2), store(v_slot, v1), store(v_slot + half, v2);
  }
}

template <typename T, typename C>
void write(const WriteHrKvParams& p, Stream stream) {
  const bool vectors =
      in_vectors({p.head_dim / 2, p.k_strides.row, p.k_strides.head, p.v_strides.row, p.v_strides.head,
                  p.k_pool_strides.row, p.k_pool_strides.head, p.v_pool_strides.row, p.v_pool_strides.head},
                 sizeof(T)) &&
      in_vectors({p.cos_row, p.sin_row}, sizeof(C)) && in_vectors(p.k) && in_vectors(p.v) && in_vectors(p.k_pool) &&
      in_vectors(p.v_pool) && in_vectors(p.cos) && in_vectors(p.sin);
  launch("write_hr_kv", vectors ? rotate_and_write<T, C, kVectorBytes / sizeof(T)> : rotate_and_write<T, C, 1>, p.rows,
         kThreads, 0, stream, p);
}

}  // namespace

void write_hr_kv(const WriteHrKvParams& params, Stream stream) {
  dispatch(params.dtype, params.table_dtype,
           [&](auto value, auto angle) { write<decltype(value), decltype(angle)>(params, stream); });
}

}  // namespace flexattn::cuda
