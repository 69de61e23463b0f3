// N x (N+M) attention for few query rows (decoding), bound by the bandwidth with which K and V are read.
//
// Split-KV: the keys of a sample, first those of the sequence, then the high-resolution ones, are cut into chunks; a
// block takes one chunk of one key head for every query row and head that reads it, and leaves (largest logit, sum,
// output) per row in the workspace. A chunk never holds keys of both kinds, so the softmax over the sequence alone
// falls out. A second kernel puts the chunks together in their order, and makes the map of the logits that the first
// one left. No tensor cores: at one query row there is one multiplication for each number read.

#include "attention_decode.h"
#include "visibility.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLeastChunk = 64, kMostChunk = 256;
constexpr int64_t kWantedBlocks =
    320;  // four for each of a V100's 80 multiprocessors, which hold two or three at a time

constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

// ------------------------------------------------------------------------------------------------ what goes where

// A softmax over some of the keys.
struct alignas(8) Statistics {
  float largest, sum;  // sum of exp(logit - largest)

  // What logits are taken relative to; 0 where nothing was seen, as exp(-inf - -inf) is no number.
  __device__ float base() const { return largest == minus_infinity<float>() ? 0.f : largest; }
  __device__ float log_sum_exp() const { return sum == 0.f ? minus_infinity<float>() : largest + logf(sum); }
};

// How the keys are cut, from upper bounds that the host knows, and where the parts are in the workspace.
struct Splits {
  int chunk;               // keys in a split
  int sequence, all;       // splits of the sequence; with the HR keys'
  float* outputs;          // [B, H, N, all, d], relative to the largest logit; not written where the sum is 0
  Statistics* statistics;  // [B, H, N, all]
  float* logits;           // [B, R, H, Nk] of the rows that have a map, or null
  int64_t bytes;

  explicit Splits(const AttentionForwardParams& p) {
    const AttentionInputs& in = p.in;
    for (chunk = kMostChunk;; chunk /= 2) {
      sequence = static_cast<int>(blocks_for(in.keys, chunk));
      all = sequence + static_cast<int>(in.k_hr ? blocks_for(in.selected, chunk) : 0);
      if (chunk == kLeastChunk || in.batch * in.kv_heads * all >= kWantedBlocks) break;
    }
    const int64_t parts = in.batch * in.heads * in.queries * all;
    outputs = static_cast<float*>(p.workspace);
    statistics = reinterpret_cast<Statistics*>(outputs + parts * in.head_dim);
    logits = p.images ? reinterpret_cast<float*>(statistics + parts) : nullptr;
    bytes = parts * (in.head_dim * sizeof(float) + sizeof(Statistics));
    if (p.images) bytes += in.batch * in.rows * in.heads * in.keys * sizeof(float);
  }
};

// 16 bytes of a row: what a lane reads at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// A key is read by a group of lanes, one vector each; groups take keys in turn, a batch of them in flight at a time.
template <typename T, int kDim>
struct Groups {
  static constexpr int kUsedLanes = kDim / Vector<T>::kSize;
  static constexpr int kLanes = power_of_two_from(kUsedLanes);
  static constexpr int kCount = kThreads / kLanes;
  static constexpr int kBatch = kLeastChunk / kCount < 8 ? kLeastChunk / kCount : 8;
};

// What a block knows of a query row.
struct Row {
  int64_t at;           // in [B, H, N]
  int end;              // one past the last key of the chunk's kind that it may see
  const int32_t* bits;  // which HR keys it sees; null = all
  float* logits;        // [Nk], or null
};

template <int kDim, int kRows, int kGroups>
struct Shared {
  float query[kRows][kDim];  // times scale
  float outputs[kRows][kGroups][kDim];
  Statistics statistics[kRows][kGroups];
  Row rows[kRows];
  int places[kMostChunk];  // row of K and V of each key in the chunk; -1 = masked
};

// ------------------------------------------------------------------------------------------------------ a chunk

// Place of row n in the map, or -1. Asked by a whole warp.
__device__ int64_t map_row(const AttentionForwardParams& p, int64_t b, int64_t n) {
  return p.in.hr_rows ? place_of_row(p.in, b, n) : n == p.in.queries - 1 ? 0 : -1;
}

// Asked by a whole warp.
__device__ Row describe_row(const AttentionForwardParams& p, const Splits& s, int64_t b, int64_t head, int64_t n,
                            bool hr) {
  const AttentionInputs& in = p.in;
  Row row{(b * in.heads + head) * in.queries + n, 0, nullptr, nullptr};
  if (hr) {
    const int64_t listed = listed_row(in, b, n);
    if (listed < 0) return row;
    row.end = static_cast<int>(hr_keys(in, b));
    row.bits = row_bits(in, b, listed);
  } else {
    row.end = static_cast<int>(end_of_keys(in, b, n));
    const int64_t place = s.logits ? map_row(p, b, n) : -1;
    if (place >= 0) row.logits = s.logits + ((b * in.rows + place) * in.heads + head) * in.keys;
  }
  return row;
}

template <typename T, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 3 : 2) attention_splits(AttentionForwardParams p, Splits s) {
  using G = Groups<T, kDim>;
  constexpr int kChannels = Vector<T>::kSize, kBatch = G::kBatch;
  auto& shared = *shared_memory<Shared<kDim, kRows, G::kCount>>();
  const AttentionInputs& in = p.in;
  const int64_t split = blockIdx.x % s.all, group = blockIdx.x / s.all % in.kv_heads,
                b = blockIdx.x / s.all / in.kv_heads;
  const int64_t heads = in.heads / in.kv_heads, rows = heads * in.queries;
  const bool hr = split >= s.sequence;

  const int64_t from = (hr ? split - s.sequence : split) * s.chunk;
  const int begin = static_cast<int>(hr ? from : max(from, first_key(in, b)));
  const int end = static_cast<int>(min(from + s.chunk, hr ? hr_keys(in, b) : end_of_keys(in, b, in.queries - 1)));
  for (int j = begin + threadIdx.x; j < end; j += kThreads)
    shared.places[j - begin] = static_cast<int>(hr ? slot(in, b, j) : unmasked(in, b, j) ? j : -1);

  const int channel = threadIdx.x % G::kLanes * kChannels, first = threadIdx.x / G::kLanes;
  const bool used = channel < kDim;
  const Strides& k_strides = hr ? in.k_hr_strides : in.k_strides;
  const Strides& v_strides = hr ? in.v_hr_strides : in.v_strides;
  const int64_t sample = hr ? 0 : b, k_row = k_strides.row, v_row = v_strides.row;
  const T* keys = row_of<T>(hr ? in.k_hr : in.k, k_strides, sample, group, 0) + (used ? channel : 0);
  const T* values = row_of<T>(hr ? in.v_hr : in.v, v_strides, sample, group, 0) + (used ? channel : 0);

  // More than kRows rows: the chunk is read again, now from the cache.
  for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
    const int here = static_cast<int>(min(rows - row0, static_cast<int64_t>(kRows)));
    for (int r = warp_in_block(); r < here; r += kWarps) {
      const int64_t n = (row0 + r) % in.queries, head = group * heads + (row0 + r) / in.queries;
      const Row row = describe_row(p, s, b, head, n, hr);
      if (lane() == 0) shared.rows[r] = row;
      const T* q = row_of<T>(in.q, in.q_strides, b, head, n);
      for (int c = lane(); c < kDim; c += kWarp) shared.query[r][c] = static_cast<float>(in.scale) * widen(q[c]);
    }
    __syncthreads();
    int stop = 0;  // one past the last key that any of these rows may see
    for (int r = 0; r < here; ++r) stop = max(stop, shared.rows[r].end);
    stop = min(stop, end);

    Statistics softmax[kRows];
    float output[kRows][kChannels];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      softmax[r] = {minus_infinity<float>(), 0.f};
#pragma unroll
      for (int c = 0; c < kChannels; ++c) output[r][c] = 0.f;
    }

    for (int j0 = begin; j0 < stop; j0 += kBatch * G::kCount) {
      int place[kBatch];
      Vector<T> k[kBatch], v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int j = j0 + i * G::kCount + first;
        place[i] = j < stop ? shared.places[j - begin] : -1;
      }
      // Without conditions, so that all of them are in flight: what stands in for a hidden key is never used.
#pragma unroll
      for (int i = 0; i < kBatch; ++i) k[i] = *reinterpret_cast<const Vector<T>*>(keys + max(place[i], 0) * k_row);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) v[i] = *reinterpret_cast<const Vector<T>*>(values + max(place[i], 0) * v_row);

#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= here || shared.rows[r].end <= j0) continue;
        const Row row = shared.rows[r];
        float logit[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          logit[i] = 0.f;
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            if (used) logit[i] += shared.query[r][channel + c] * widen(k[i].values[c]);
        }
#pragma unroll
        for (int step = G::kLanes / 2; step > 0; step /= 2)
#pragma unroll
          for (int i = 0; i < kBatch; ++i) logit[i] += __shfl_xor_sync(kAllLanes, logit[i], step);

        float highest = softmax[r].largest;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int j = j0 + i * G::kCount + first;
          const bool seen = place[i] >= 0 && j < row.end && (!row.bits || bit(row.bits, j));
          if (!seen) logit[i] = minus_infinity<float>();
          if (seen && row.logits && threadIdx.x % G::kLanes == i) row.logits[j] = logit[i];
          highest = larger(highest, logit[i]);
        }
        const float before = softmax[r].largest;
        softmax[r].largest = highest;
        const float base = softmax[r].base(), shrink = expf(before - base);
        softmax[r].sum *= shrink;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) output[r][c] *= shrink;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float weight = expf(logit[i] - base);
          softmax[r].sum += weight;
          if (weight == 0.f) continue;  // a NaN in the values of a hidden key stays hidden
#pragma unroll
          for (int c = 0; c < kChannels; ++c) output[r][c] += weight * widen(v[i].values[c]);
        }
      }
    }

    // The groups together, in their order.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (threadIdx.x % G::kLanes == 0) shared.statistics[r][first] = softmax[r];
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (used) shared.outputs[r][first][channel + c] = output[r][c];
    }
    __syncthreads();
    for (int r = 0; r < here; ++r) {
      Statistics total{minus_infinity<float>(), 0.f};
      float sum = 0.f;
      const int c = threadIdx.x < kDim ? threadIdx.x : 0;
      for (int g = 0; g < G::kCount; ++g) total.largest = larger(total.largest, shared.statistics[r][g].largest);
      for (int g = 0; g < G::kCount; ++g) {
        const float factor = expf(shared.statistics[r][g].largest - total.base());
        total.sum += factor * shared.statistics[r][g].sum;
        sum += factor * shared.outputs[r][g][c];
      }
      const int64_t part = shared.rows[r].at * s.all + split;
      if (threadIdx.x == 0) s.statistics[part] = total;
      if (threadIdx.x < kDim && total.sum != 0.f) s.outputs[part * kDim + c] = sum;
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------- all chunks of a row

// The softmax over splits [0, count) of a row. Asked by a whole warp.
__device__ Statistics merge(const Statistics* parts, int count) {
  Statistics total{minus_infinity<float>(), 0.f};
  for (int i = lane(); i < count; i += kWarp) total.largest = larger(total.largest, parts[i].largest);
  total.largest = warp_max(total.largest);
  for (int i = lane(); i < count; i += kWarp) total.sum += parts[i].sum * expf(parts[i].largest - total.base());
  total.sum = warp_sum(total.sum);
  return total;
}

// out, lse and lse_seq of one row: a block, whose threads take a channel each.
template <typename T>
__device__ void combine_row(const AttentionForwardParams& p, const Splits& s, int64_t row) {
  const AttentionInputs& in = p.in;
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads,
                c = threadIdx.x;
  const Statistics* parts = s.statistics + row * s.all;
  const Statistics all = merge(parts, s.all), sequence = merge(parts, s.sequence);
  const float alpha = listed_row(in, b, n) >= 0 ? mixing<float>(in, b) : 1.f;
  if (c == 0) {
    static_cast<float*>(p.lse)[row] = all.log_sum_exp();
    static_cast<float*>(p.lse_seq)[row] = sequence.log_sum_exp();
  }
  if (c >= in.head_dim) return;
  float full = 0.f, plain = 0.f;
#pragma unroll 8
  for (int i = 0; i < s.all; ++i) {
    const Statistics part = parts[i];
    const float output = part.sum == 0.f ? 0.f : s.outputs[(row * s.all + i) * in.head_dim + c];
    full += expf(part.largest - all.base()) * output;
    if (i < s.sequence) plain += expf(part.largest - sequence.base()) * output;
  }
  full = all.sum == 0.f ? 0.f : full / all.sum;
  plain = sequence.sum == 0.f ? 0.f : plain / sequence.sum;
  static_cast<T*>(p.out)[((b * in.queries + n) * in.heads + head) * in.head_dim + c] =
      narrow<T>(alpha == 1.f ? full : alpha * full + (1.f - alpha) * plain);
}

// map[b, r, i, cell] = sum over heads, in their order, of exp(logit - lse): a block per kThreads cells of a row of the
// map.
__device__ void combine_map(const AttentionForwardParams& p, const Splits& s, int64_t block) {
  const AttentionInputs& in = p.in;
  const int64_t cells = p.images * p.map_size, blocks = (cells + kThreads - 1) / kThreads;
  const int64_t at = block % blocks * kThreads + threadIdx.x, r = block / blocks % in.rows,
                b = block / blocks / in.rows;
  const int64_t n = in.hr_rows ? row_at(in, b, r) : in.queries - 1;
  float* lse = shared_memory<float>();  // [H]
  for (int64_t head = warp_in_block(); n >= 0 && head < in.heads; head += kWarps) {
    const Statistics* parts = s.statistics + ((b * in.heads + head) * in.queries + n) * s.all;
    const float value = merge(parts, p.map_over_all ? s.all : s.sequence).log_sum_exp();
    if (lane() == 0) lse[head] = value;
  }
  __syncthreads();
  if (at >= cells) return;
  const int32_t* range = p.map_ranges + (b * p.images + at / p.map_size) * 2;
  require("hierarchical_attention: map_ranges", range[0], 0, in.keys);
  require("hierarchical_attention: map_ranges", range[1], range[0], in.keys);
  const int64_t j = range[0] + at % p.map_size;
  float sum = 0.f;
  if (n >= 0 && j < range[1] && j >= first_key(in, b) && j < end_of_keys(in, b, n) && unmasked(in, b, j)) {
    const float* logits = s.logits + (b * in.rows + r) * in.heads * in.keys + j;
#pragma unroll 8
    for (int64_t head = 0; head < in.heads; ++head) sum += expf(logits[head * in.keys] - lse[head]);
  }
  static_cast<float*>(p.map)[(b * in.rows + r) * cells + at] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) combine_splits(AttentionForwardParams p, Splits s) {
  const int64_t rows = p.in.batch * p.in.heads * p.in.queries;
  if (blockIdx.x < rows)
    combine_row<T>(p, s, blockIdx.x);
  else
    combine_map(p, s, blockIdx.x - rows);
}

// ------------------------------------------------------------------------------------------------------- launch

template <typename T, int kDim, int kRows>
void launch_splits(const AttentionForwardParams& p, const Splits& s, Stream stream) {
  launch("hierarchical_attention (decode)", attention_splits<T, kDim, kRows>, p.in.batch * p.in.kv_heads * s.all,
         kThreads, sizeof(Shared<kDim, kRows, Groups<T, kDim>::kCount>), stream, p, s);
}

template <typename T, int kDim>
void launch_splits(const AttentionForwardParams& p, const Splits& s, Stream stream) {
  const bool one_row = p.in.heads == p.in.kv_heads && p.in.queries == 1;
  one_row ? launch_splits<T, kDim, 1>(p, s, stream) : launch_splits<T, kDim, 4>(p, s, stream);
}

template <typename T>
void forward(const AttentionForwardParams& p, Stream stream) {
  const Splits s(p);
  switch (p.in.head_dim) {
    case 64:
      launch_splits<T, 64>(p, s, stream);
      break;
    case 80:
      launch_splits<T, 80>(p, s, stream);
      break;
    case 96:
      launch_splits<T, 96>(p, s, stream);
      break;
    case 128:
      launch_splits<T, 128>(p, s, stream);
      break;
  }
  const int64_t rows = p.in.batch * p.in.heads * p.in.queries;
  const int64_t map = p.in.batch * p.in.rows * blocks_for(p.images * p.map_size, kThreads);
  launch("hierarchical_attention (combine)", combine_splits<T>, rows + map, kThreads, p.in.heads * sizeof(float),
         stream, p, s);
}

}  // namespace

int64_t attention_decode_workspace(const AttentionForwardParams& params) { return Splits(params).bytes; }

void attention_decode(const AttentionForwardParams& params, Stream stream) {
  switch (params.in.dtype) {
    case DType::kFloat32:
      return forward<float>(params, stream);
    case DType::kFloat16:
      return forward<__half>(params, stream);
    case DType::kBFloat16:
      return forward<__nv_bfloat16>(params, stream);
    case DType::kFloat64:
      break;  // attention_path.h sends it elsewhere
  }
}

}  // namespace flexattn::cuda
