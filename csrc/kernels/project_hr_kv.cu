// Two matrix products with few rows, whose number is known to the device alone, bound by the bandwidth with which the
// weights are read. A warp owns two channels of a key head that the rotation mixes, c and c + d/2, of the key and of
// the value: it reads their four rows of the weights, its lanes taking turns along D, for kRows new tokens at a time.
// Where no token is new, the weights are not read at all.

#include "flexattn/project_hr_kv.h"
#include "launch.cuh"
#include "numeric.cuh"
#include "require.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 8;      // tokens at a time
constexpr int kProducts = 4;  // of a token: channels c and c + d/2 of the key, and of the value

// Of each product of a warp, the row of the weights: its channel in [0, Hkv * d).
struct Channels {
  int64_t head, first, half;

  __device__ int64_t operator[](int i) const { return head * 2 * half + first + (i % 2) * half; }
};

__device__ int64_t new_rows(const ProjectHrKvParams& p) {
  require("project_hr_kv: count", *p.count, 0, p.rows);
  return *p.count;
}

__device__ int64_t token_of(const ProjectHrKvParams& p, int64_t row) {
  require("project_hr_kv: tokens", p.new_tokens[row], 0, p.tokens - 1);
  return p.new_tokens[row];
}

// Add a lane's share of the products of tokens first .. first + kRows - 1; those past `count` repeat the last one.
template <typename T, int N, typename A>
__device__ void multiply(const ProjectHrKvParams& p, const Channels& channels, int64_t first, int64_t count,
                         A (&sums)[kProducts][kRows]) {
  const T* features[kRows];
  const T* weights[kProducts];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    features[r] = static_cast<const T*>(p.features) + token_of(p, min(first + r, count - 1)) * p.channels;
#pragma unroll
  for (int i = 0; i < kProducts; ++i)
    weights[i] = static_cast<const T*>(i < 2 ? p.k_weight : p.v_weight) + channels[i] * p.channels;
  for (int64_t c = lane() * N; c < p.channels; c += kWarp * N) {
    Vector<T, N> weight[kProducts];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) weight[i] = load<N>(weights[i] + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto feature = load<N>(features[r] + c);
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < kProducts; ++i)
          sums[i][r] += static_cast<A>(widen(weight[i].element[j])) * static_cast<A>(widen(feature.element[j]));
    }
  }
}

// Give lane r the whole products of token r.
template <typename A>
__device__ void add_lanes(const A (&sums)[kProducts][kRows], A (&product)[kProducts]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const A total = warp_sum(sums[i][r]);
      if (lane() == r) product[i] = total;
    }
}

// Rotate the two channels of the key, and write them and those of the value. Called by the lane of a token.
template <typename T, typename C, typename A>
__device__ void write_token(const ProjectHrKvParams& p, const Channels& channels, int64_t row,
                            A (&product)[kProducts]) {
  const int64_t slot = p.new_slots[row];
  require("project_hr_kv: slots", slot, 0, p.pool - 1);
  for (int i = 0; i < kProducts; ++i) {
    const T* bias = static_cast<const T*>(i < 2 ? p.k_bias : p.v_bias);
    if (bias) product[i] += static_cast<A>(widen(bias[channels[i]]));
    product[i] = static_cast<A>(widen(narrow<T>(product[i])));
  }
  const int64_t c = channels.first, half = channels.half, at = token_of(p, row) * p.head_dim + c;
  const C *cos = static_cast<const C*>(p.cos) + at, *sin = static_cast<const C*>(p.sin) + at;
  const auto wide = [](C x) { return static_cast<A>(widen(x)); };
  const auto in_pool = [&](void* pool, const Strides& s) {
    return static_cast<T*>(pool) + slot * s.row + channels.head * s.head + c;
  };
  T *k = in_pool(p.k_pool, p.k_pool_strides), *v = in_pool(p.v_pool, p.v_pool_strides);
  k[0] = narrow<T>(product[0] * wide(cos[0]) - product[1] * wide(sin[0]));
  k[half] = narrow<T>(product[1] * wide(cos[half]) + product[0] * wide(sin[half]));
  v[0] = narrow<T>(product[2]);
  v[half] = narrow<T>(product[3]);
}

// T: features, weights and pool, C: cos and sin; N: elements that a lane loads at once.
template <typename T, typename C, int N>
__global__ void __launch_bounds__(kThreads) project_new_tokens(ProjectHrKvParams p) {
  using A = typename Accumulator<T>::type;
  const int64_t half = p.head_dim / 2, pair = static_cast<int64_t>(blockIdx.x) * kWarps + warp_in_block();
  if (pair >= p.heads * half) return;
  const Channels channels{pair / half, pair % half, half};
  const int64_t count = new_rows(p);
  for (int64_t first = 0; first < count; first += kRows) {
    A sums[kProducts][kRows] = {}, product[kProducts] = {};
    multiply<T, N>(p, channels, first, count, sums);
    add_lanes(sums, product);
    if (lane() < kRows && first + lane() < count) write_token<T, C>(p, channels, first + lane(), product);
  }
}

template <typename T, typename C>
void project(const ProjectHrKvParams& p, Stream stream) {
  const bool vectors =
      in_vectors({p.channels}, sizeof(T)) && in_vectors(p.features) && in_vectors(p.k_weight) && in_vectors(p.v_weight);
  launch("project_hr_kv", vectors ? project_new_tokens<T, C, kVectorBytes / sizeof(T)> : project_new_tokens<T, C, 1>,
         blocks_for(p.heads * p.head_dim / 2, kWarps), kThreads, 0, stream, p);
}

}  // namespace

void project_hr_kv(const ProjectHrKvParams& params, Stream stream) {
  dispatch(params.dtype, params.table_dtype,
           [&](auto value, auto angle) { project<decltype(value), decltype(angle)>(params, stream); });
}

}  // namespace flexattn::cuda
