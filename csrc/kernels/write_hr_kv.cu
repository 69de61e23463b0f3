// A block per new token: its threads share the heads and the channels. A thread holds a piece of each half of a head, which the
// rotation mixes: 16 bytes each where addresses, strides and d allow, else one element.

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
  using Piece = Vector<T, N>;
  using Angles = Vector<C, N>;
  const int64_t row = blockIdx.x, slot = p.slots[row];
  require("write_hr_kv: slots", slot, -1, p.pool - 1);
  if (slot < 0) return;
  const int half = static_cast<int>(p.head_dim / 2), pieces = half / N, work = static_cast<int>(p.heads) * pieces;
  const C* cos = static_cast<const C*>(p.cos) + row * p.cos_row;
  const C* sin = static_cast<const C*>(p.sin) + row * p.sin_row;
  for (int i = threadIdx.x; i < work; i += kThreads) {
    const int head = i / pieces, c = i % pieces * N;
    const auto from = [&](const void* data, const Strides& s) { return static_cast<const T*>(data) + row * s.row + head * s.head + c; };
    const auto to = [&](void* data, const Strides& s) { return static_cast<T*>(data) + slot * s.row + head * s.head + c; };
    const auto load = [](const T* x) { return *reinterpret_cast<const Piece*>(x); };
    const auto store = [](T* x, const Piece& piece) { *reinterpret_cast<Piece*>(x) = piece; };
    const auto angles = [](const C* x) { return *reinterpret_cast<const Angles*>(x); };
    const T *k = from(p.k, p.k_strides), *v = from(p.v, p.v_strides);
    T *k_slot = to(p.k_pool, p.k_pool_strides), *v_slot = to(p.v_pool, p.v_pool_strides);

    const Piece k1 = load(k), k2 = load(k + half), v1 = load(v), v2 = load(v + half);
    const Angles cos1 = angles(cos + c), cos2 = angles(cos + half + c), sin1 = angles(sin + c), sin2 = angles(sin + half + c);
    Piece r1, r2;
    for (int j = 0; j < N; ++j) {
      const A x1 = widen(k1.element[j]), x2 = widen(k2.element[j]);
      r1.element[j] = narrow<T>(x1 * static_cast<A>(widen(cos1.element[j])) - x2 * static_cast<A>(widen(sin1.element[j])));
      r2.element[j] = narrow<T>(x2 * static_cast<A>(widen(cos2.element[j])) + x1 * static_cast<A>(widen(sin2.element[j])));
    }
    store(k_slot, r1), store(k_slot + half, r2), store(v_slot, v1), store(v_slot + half, v2);
  }
}

template <typename T, typename C>
void write(const WriteHrKvParams& p, Stream stream) {
  const bool vectors =
      in_vectors({p.head_dim / 2, p.k_strides.row, p.k_strides.head, p.v_strides.row, p.v_strides.head, p.k_pool_strides.row,
                  p.k_pool_strides.head, p.v_pool_strides.row, p.v_pool_strides.head}, sizeof(T)) &&
      in_vectors({p.cos_row, p.sin_row}, sizeof(C)) && in_vectors(p.k) && in_vectors(p.v) && in_vectors(p.k_pool) &&
      in_vectors(p.v_pool) && in_vectors(p.cos) && in_vectors(p.sin);
  launch("write_hr_kv", vectors ? rotate_and_write<T, C, kVectorBytes / sizeof(T)> : rotate_and_write<T, C, 1>, p.rows, kThreads, 0,
         stream, p);
}

}  // namespace

void write_hr_kv(const WriteHrKvParams& params, Stream stream) {
  dispatch(params.dtype, [&](auto value) {
    using T = decltype(value);
    params.table_dtype == params.dtype ? write<T, T>(params, stream) : write<T, float>(params, stream);
  });
}

}  // namespace flexattn::cuda
