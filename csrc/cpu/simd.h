// One source, several instruction sets: kernels are written once with the compiler's vector types and compiled for each
// machine below; the call picks the best one that the CPU has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about vectors as arguments; every function that takes one is inlined
#endif
#define FLEXATTN_INLINE inline __attribute__((always_inline))

namespace flexattn::cpu {

// A block in registers has `height` rows of `width` vectors of `bytes` each.
template <int bytes_, int height_, int width_>
struct Machine {
  static constexpr int bytes = bytes_, height = height_, width = width_;
};
using Avx512 = Machine<64, 8, 2>;
using Avx2 = Machine<32, 4, 2>;
using Baseline = Machine<16, 4, 2>;  // SSE2, NEON

template <typename A, class M>
struct VectorOf {
  typedef A type __attribute__((vector_size(M::bytes)));
  typedef A unaligned __attribute__((vector_size(M::bytes), aligned(alignof(A)), may_alias));
  static constexpr int lanes = M::bytes / sizeof(A);
};
template <typename A, class M>
using Vector = typename VectorOf<A, M>::type;

template <class M, typename A>
FLEXATTN_INLINE Vector<A, M> load(const A* data) {
  return *reinterpret_cast<const typename VectorOf<A, M>::unaligned*>(data);
}
template <class M, typename A>
FLEXATTN_INLINE void store(A* data, Vector<A, M> value) {
  *reinterpret_cast<typename VectorOf<A, M>::unaligned*>(data) = value;
}

#if defined(__x86_64__)
#define FLEXATTN_AVX512 \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define FLEXATTN_AVX2 __attribute__((target("avx2,fma,f16c")))

template <class Kernel, typename... Arguments>
FLEXATTN_AVX512 void run_avx512(Arguments... arguments) {
  Kernel::template run<Avx512>(arguments...);
}
template <class Kernel, typename... Arguments>
FLEXATTN_AVX2 void run_avx2(Arguments... arguments) {
  Kernel::template run<Avx2>(arguments...);
}

inline int best_machine() {
  static const int best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
      return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
  }();
  return best;
}
#endif

// Call Kernel::run<Machine>(arguments...) for the best machine. `run` and everything it calls must be FLEXATTN_INLINE:
// only what is inlined here is compiled for that instruction set.
template <class Kernel, typename... Arguments>
void run_best(Arguments... arguments) {
#if defined(__x86_64__)
  switch (best_machine()) {
    case 2:
      return run_avx512<Kernel>(arguments...);
    case 1:
      return run_avx2<Kernel>(arguments...);
  }
#endif
  Kernel::template run<Baseline>(arguments...);
}

}  // namespace flexattn::cpu
