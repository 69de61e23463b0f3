// N x (N+M) attention for few query rows (decoding), bound by the bandwidth with which K and V are read.
//
// Split-KV: the keys of a sample, first those of the sequence, then the high-resolution ones, are cut into chunks. A
// block takes one chunk of one key head, for every query row and head that reads it, and leaves the softmax state and
// the output of each row in the workspace. A chunk never holds keys of both kinds, so the softmax over the sequence
// alone falls out. A second kernel merges the chunks in their order, and makes the map from the logits that the first
// one kept. No tensor cores: with one query row there is one multiplication per number read.

#include "attention_decode.h"
#include "attention_map.cuh"
#include "device.cuh"
#include "flexattn/decode_splits.h"
#include "vector.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

// ------------------------------------------------------------------------------------------------ layout of the work

using Softmax = SoftmaxState<float>;

// How the keys that the queries may see are cut, and where the parts are in the workspace.
struct Splits : DecodeSplits {
  float* outputs;    // [B, H, N, all, d], not normalised; not written where the row sees no key of the split
  Softmax* softmax;  // [B, H, N, all]
  float* logits;     // [B, R, H, Nk] of the rows that have a map, or null
  int64_t bytes;

  explicit Splits(const AttentionForwardParams& p) : DecodeSplits(choose_splits(decode_work(p.in, multiprocessors()))) {
    const AttentionInputs& in = p.in;
    const int64_t parts = in.batch * in.heads * in.queries * all;
    outputs = static_cast<float*>(p.workspace);
    softmax = reinterpret_cast<Softmax*>(outputs + parts * in.head_dim);
    logits = p.images ? reinterpret_cast<float*>(softmax + parts) : nullptr;
    bytes = parts * (in.head_dim * sizeof(float) + sizeof(Softmax));
    if (p.images) bytes += in.batch * in.rows * in.heads * in.keys * sizeof(float);
  }

  __device__ float* logits_of(const AttentionInputs& in, int64_t b, int64_t r, int64_t head) const {
    return logits + ((b * in.rows + r) * in.heads + head) * in.keys;
  }
};

// A key is read by a group of lanes, one vector each; groups take keys in turn, a batch of them in flight at a time.
template <typename T, int kDim>
struct Groups {
  static constexpr int kChannels = kVectorBytes / sizeof(T);  // of a lane
  static constexpr int kLanes = power_of_two_from(kDim / kChannels);
  static constexpr int kCount = kThreads / kLanes;
  static constexpr int kBatch = kChunkStep / kCount < 8 ? kChunkStep / kCount : 8;

  static __device__ int lane_in_group() { return threadIdx.x % kLanes; }
  static __device__ int group() { return threadIdx.x / kLanes; }
  static __device__ int first_channel() { return lane_in_group() * kChannels; }
  static __device__ bool has_channels() { return first_channel() < kDim; }
  static __device__ int key(int first, int i) { return first + i * kCount + group(); }  // of the batch from `first` on
};

// What a block reads: keys begin .. end - 1 of one kind.
struct Chunk {
  int64_t b, kv_head, split;
  bool hr;
  int begin, end;
};

// What a block knows of a query row.
struct Row {
  int64_t index;        // in [B, H, N]
  KeyInterval keys;     // of the chunk's kind that the row may see
  const int32_t* bits;  // which HR keys it sees; null = all
  float* logits;        // [Nk], to keep for the map, or null
};

template <typename T, int kDim, int kRows>
struct Shared {
  static constexpr int kGroups = Groups<T, kDim>::kCount;
  float query[kRows][kDim];  // times scale and log2(e): products with keys are logits in base 2
  float outputs[kRows][kGroups][kDim];
  Softmax softmax[kRows][kGroups];
  Row rows[kRows];

  // Behind it: row of K and V of each key in the chunk; -1 = masked.
  __device__ int* key_rows() { return reinterpret_cast<int*>(this + 1); }
  static size_t bytes(int chunk) { return sizeof(Shared) + chunk * sizeof(int); }
};

// A batch of keys and their values, in registers.
template <typename T, int kDim>
struct Batch {
  using G = Groups<T, kDim>;
  int first;               // key i of the lane's group is G::key(first, i)
  int key_row[G::kBatch];  // -1: not seen by any row
  Vector<T, G::kChannels> k[G::kBatch], v[G::kBatch];
};

// --------------------------------------------------------------------------------------------- before the loop

__device__ Chunk chunk_of_block(const AttentionInputs& in, const Splits& s) {
  Chunk chunk;
  chunk.split = blockIdx.x % s.all;
  chunk.kv_head = blockIdx.x / s.all % in.kv_heads;
  chunk.b = blockIdx.x / s.all / in.kv_heads;
  chunk.hr = chunk.split >= s.sequence;
  if (chunk.hr) {
    chunk.begin = static_cast<int>((chunk.split - s.sequence) * s.chunk);
    chunk.end = min(chunk.begin + s.chunk, static_cast<int>(hr_keys(in, chunk.b)));
  } else {
    check_ranges(in, chunk.b);
    chunk.begin = keys_of_query(in, chunk.b, 0).begin + static_cast<int>(chunk.split) * s.chunk;
    chunk.end = min(chunk.begin + s.chunk, keys_of_query(in, chunk.b, in.queries - 1).end);
  }
  return chunk;
}

__device__ void list_key_rows(const AttentionInputs& in, const Chunk& chunk, int* key_rows) {
  for (int j = chunk.begin + threadIdx.x; j < chunk.end; j += kThreads)
    key_rows[j - chunk.begin] = static_cast<int>(chunk.hr ? slot(in, chunk.b, j) : unmasked(in, chunk.b, j) ? j : -1);
}

// Called by a whole warp.
__device__ Row describe_row(const AttentionInputs& in, const Splits& s, const Chunk& chunk, int64_t head, int64_t n) {
  const int64_t b = chunk.b;
  Row row{(b * in.heads + head) * in.queries + n, {0, 0}, nullptr, nullptr};
  if (chunk.hr) {
    const int64_t r = hr_row_of_query(in, b, n);
    if (r < 0) return row;
    row.keys.end = static_cast<int>(hr_keys(in, b));
    row.bits = row_bits(in, b, r);
  } else {
    row.keys = keys_of_query(in, b, n);
    const int64_t r = s.logits ? map_row_of_query(in, b, n) : -1;
    if (r >= 0) row.logits = s.logits_of(in, b, r, head);
  }
  return row;
}

// Rows first .. first + count - 1 of those that read the chunk's key head.
template <typename T, int kDim, int kRows>
__device__ void load_rows(const AttentionInputs& in, const Splits& s, const Chunk& chunk, int64_t first, int count,
                          Shared<T, kDim, kRows>& shared) {
  const float scale = static_cast<float>(in.scale * kLog2e);
  for (int r = warp_in_block(); r < count; r += kWarps) {
    const int64_t n = (first + r) % in.queries;
    const int64_t head = chunk.kv_head * (in.heads / in.kv_heads) + (first + r) / in.queries;
    const Row row = describe_row(in, s, chunk, head, n);
    if (lane() == 0) shared.rows[r] = row;
    const T* q = row_of<T>(in.q, in.q_strides, chunk.b, head, n);
    for (int c = lane(); c < kDim; c += kWarp) shared.query[r][c] = scale * widen(q[c]);
  }
}

// One past the last key of the chunk that any of the rows may see.
template <typename T, int kDim, int kRows>
__device__ int end_of_chunk(const Chunk& chunk, const Shared<T, kDim, kRows>& shared, int count) {
  int end = 0;
  for (int r = 0; r < count; ++r) end = max(end, shared.rows[r].keys.end);
  return min(end, chunk.end);
}

// -------------------------------------------------------------------------------------------- the steps of the loop

// A lane's channels of rows of keys or values.
template <typename T>
struct LaneRows {
  const T* data;
  int64_t stride;
};

template <typename T, int kDim>
__device__ LaneRows<T> lane_rows(const Chunk& chunk, const void* data, const Strides& strides) {
  using G = Groups<T, kDim>;
  const T* rows = row_of<T>(data, strides, chunk.hr ? 0 : chunk.b, chunk.kv_head, 0);
  return {rows + (G::has_channels() ? G::first_channel() : 0), strides.row};
}

// Loads are unconditional, so that all of them are in flight; what stands in for a hidden key is never used.
template <typename T, int kDim>
__device__ __forceinline__ void load_batch(const Chunk& chunk, const int* key_rows, int end, const LaneRows<T>& keys,
                                           const LaneRows<T>& values, Batch<T, kDim>& batch) {
  using G = Groups<T, kDim>;
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i) {
    const int j = G::key(batch.first, i);
    batch.key_row[i] = j < end ? key_rows[j - chunk.begin] : -1;
  }
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i)
    batch.k[i] = load<G::kChannels>(keys.data + max(batch.key_row[i], 0) * keys.stride);
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i)
    batch.v[i] = load<G::kChannels>(values.data + max(batch.key_row[i], 0) * values.stride);
}

// Every lane of a group ends with the logits of the group's keys. softcap: in base 2.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(const Batch<T, kDim>& batch, const float* query, float softcap,
                                              float (&logit)[Groups<T, kDim>::kBatch]) {
  using G = Groups<T, kDim>;
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i) {
    logit[i] = 0.f;
#pragma unroll
    for (int c = 0; c < G::kChannels; ++c)
      if (G::has_channels()) logit[i] += query[G::first_channel() + c] * widen(batch.k[i].element[c]);
  }
#pragma unroll
  for (int step = G::kLanes / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < G::kBatch; ++i) logit[i] += __shfl_xor_sync(kAllLanes, logit[i], step);
  if (softcap == 0.f) return;
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i) logit[i] = cap(logit[i], softcap);
}

// Hide what the row does not see, and keep the other logits if the row has a map: lane i of a group keeps key i.
template <typename T, int kDim>
__device__ __forceinline__ void mask_and_keep_logits(const Batch<T, kDim>& batch, const Row& row,
                                                     float (&logit)[Groups<T, kDim>::kBatch]) {
  using G = Groups<T, kDim>;
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i) {
    const int j = G::key(batch.first, i);
    const bool seen =
        batch.key_row[i] >= 0 && row.keys.begin <= j && j < row.keys.end && (!row.bits || bit(row.bits, j));
    if (!seen) logit[i] = minus_infinity<float>();
    if (seen && row.logits && G::lane_in_group() == i) row.logits[j] = logit[i];
  }
}

// Add the batch to the softmax and the output of a row.
template <typename T, int kDim>
__device__ __forceinline__ void softmax_step(const Batch<T, kDim>& batch, const float (&logit)[Groups<T, kDim>::kBatch],
                                             Softmax& softmax, float (&output)[Groups<T, kDim>::kChannels]) {
  using G = Groups<T, kDim>;
  float max_logit = minus_infinity<float>();
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i) max_logit = fmax(max_logit, logit[i]);
  const float rescale = softmax.raise_max(max_logit);
#pragma unroll
  for (int c = 0; c < G::kChannels; ++c) output[c] *= rescale;
#pragma unroll
  for (int i = 0; i < G::kBatch; ++i) {
    const float weight = softmax.weight(logit[i]);
    softmax.row_sum += weight;
    if (weight == 0.f) continue;  // a NaN in the values of a hidden key stays hidden
#pragma unroll
    for (int c = 0; c < G::kChannels; ++c) output[c] += weight * widen(batch.v[i].element[c]);
  }
}

// ------------------------------------------------------------------------------------------------ after the loop

template <typename T, int kDim, int kRows>
__device__ __forceinline__ void store_groups(const Softmax (&softmax)[kRows],
                                             const float (&output)[kRows][Groups<T, kDim>::kChannels],
                                             Shared<T, kDim, kRows>& shared) {
  using G = Groups<T, kDim>;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (G::lane_in_group() == 0) shared.softmax[r][G::group()] = softmax[r];
#pragma unroll
    for (int c = 0; c < G::kChannels; ++c)
      if (G::has_channels()) shared.outputs[r][G::group()][G::first_channel() + c] = output[r][c];
  }
}

// Merge the groups, in their order, into the workspace; a thread per channel.
template <typename T, int kDim, int kRows>
__device__ void merge_groups(const Splits& s, const Chunk& chunk, const Shared<T, kDim, kRows>& shared, int count) {
  constexpr int kGroups = Groups<T, kDim>::kCount;
  const int c = threadIdx.x < kDim ? threadIdx.x : 0;
  for (int r = 0; r < count; ++r) {
    Softmax total;
    for (int g = 0; g < kGroups; ++g) total.row_max = fmax(total.row_max, shared.softmax[r][g].row_max);
    float output = 0.f;
    for (int g = 0; g < kGroups; ++g) {
      total.merge(shared.softmax[r][g]);
      output += total.weight(shared.softmax[r][g].row_max) * shared.outputs[r][g][c];
    }
    const int64_t part = shared.rows[r].index * s.all + chunk.split;
    if (threadIdx.x == 0) s.softmax[part] = total;
    if (threadIdx.x < kDim && total.row_sum != 0.f) s.outputs[part * kDim + c] = output;
  }
}

template <typename T, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 3 : 2) attention_splits(AttentionForwardParams p, Splits s) {
  using G = Groups<T, kDim>;
  auto& shared = *shared_memory<Shared<T, kDim, kRows>>();
  const AttentionInputs& in = p.in;
  const Chunk chunk = chunk_of_block(in, s);
  list_key_rows(in, chunk, shared.key_rows());
  const auto keys =
      chunk.hr ? lane_rows<T, kDim>(chunk, in.k_hr, in.k_hr_strides) : lane_rows<T, kDim>(chunk, in.k, in.k_strides);
  const auto values =
      chunk.hr ? lane_rows<T, kDim>(chunk, in.v_hr, in.v_hr_strides) : lane_rows<T, kDim>(chunk, in.v, in.v_strides);

  const float softcap = static_cast<float>(in.softcap * kLog2e);
  // With more than kRows rows the chunk is read again, now from the cache.
  const int64_t rows = in.heads / in.kv_heads * in.queries;
  for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
    const int count = static_cast<int>(min(rows - row0, static_cast<int64_t>(kRows)));
    load_rows(in, s, chunk, row0, count, shared);
    __syncthreads();

    Softmax softmax[kRows];
    float output[kRows][G::kChannels] = {};
    const int end = end_of_chunk(chunk, shared, count);
    Batch<T, kDim> batch;
    for (batch.first = chunk.begin; batch.first < end; batch.first += G::kBatch * G::kCount) {
      load_batch(chunk, shared.key_rows(), end, keys, values, batch);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= count || shared.rows[r].keys.end <= batch.first) continue;
        const Row row = shared.rows[r];
        float logit[G::kBatch];
        multiply_keys(batch, shared.query[r], softcap, logit);
        mask_and_keep_logits(batch, row, logit);
        softmax_step(batch, logit, softmax[r], output[r]);
      }
    }

    store_groups(softmax, output, shared);
    __syncthreads();
    merge_groups(s, chunk, shared, count);
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------- all chunks of a row

// The softmax over splits 0 .. count - 1 of a row. Called by a whole warp.
__device__ Softmax merge_splits(const Softmax* parts, int count) {
  Softmax total;
  for (int i = lane(); i < count; i += kWarp) total.row_max = fmax(total.row_max, parts[i].row_max);
  total.row_max = warp_max(total.row_max);
  for (int i = lane(); i < count; i += kWarp) total.merge(parts[i]);
  total.row_sum = warp_sum(total.row_sum);
  return total;
}

// What a warp has merged of a row's splits: of those of the sequence, or of HR keys. A lane holds four channels.
constexpr int kLaneChannels = 4, kMaxChannels = kLaneChannels * kWarp;
struct Merged {
  Softmax softmax;
  Vector<float, kLaneChannels> output{};

  // Add splits; one with row_sum 0 has no output.
  template <int n>
  __device__ __forceinline__ void add(const Softmax (&parts)[n], const Vector<float, kLaneChannels> (&outputs)[n]) {
    float max_part = minus_infinity<float>();
#pragma unroll
    for (int i = 0; i < n; ++i) max_part = fmax(max_part, parts[i].row_max);
    const float rescale = softmax.raise_max(max_part);
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) output.element[c] *= rescale;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float weight = softmax.weight(parts[i].row_max);
      softmax.row_sum += weight * parts[i].row_sum;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c)
        output.element[c] += parts[i].row_sum == 0.f ? 0.f : weight * outputs[i].element[c];
    }
  }
};

// What the warps have merged: of the sequence, then of HR keys.
struct MergedByWarps {
  Softmax softmax[2 * kWarps];
  float outputs[2 * kWarps][kMaxChannels];

  // Softmax over the first `kinds` kinds, and in `output` the sum of values in channel c.
  __device__ Softmax total(int kinds, int c, float& output) const {
    Softmax all;
    for (int i = 0; i < kinds * kWarps; ++i) all.row_max = fmax(all.row_max, softmax[i].row_max);
    output = 0.f;
    for (int i = 0; i < kinds * kWarps; ++i) {
      all.merge(softmax[i]);
      output += all.weight(softmax[i].row_max) * outputs[i][c];
    }
    return all;
  }
};

// The warps take splits in turn, and of each warp a batch is in flight at a time: every one of up to 32 splits. Loads
// are unconditional; what a split has not written is never used.
__device__ void merge_by_warps(const AttentionInputs& in, const Splits& s, int64_t row, MergedByWarps& merged) {
  constexpr int kBatch = 8;
  const int channel = kLaneChannels * lane(), d = static_cast<int>(in.head_dim);
  const Softmax* parts_of_row = s.softmax + row * s.all;
  const float* outputs_of_row = s.outputs + row * s.all * d + (channel < d ? channel : 0);
  Merged kinds[2];
  for (int first = warp_in_block(); first < s.all; first += kWarps * kBatch) {
    Softmax parts[2][kBatch];
    Vector<float, kLaneChannels> outputs[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int split = first + i * kWarps, at = min(split, s.all - 1);
      const Softmax part = parts_of_row[at];
      outputs[i] = load<kLaneChannels>(outputs_of_row + static_cast<int64_t>(at) * d);
      parts[0][i] = split < s.sequence ? part : Softmax();
      parts[1][i] = split >= s.sequence && split < s.all ? part : Softmax();
    }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) kinds[kind].add(parts[kind], outputs);
  }
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    const int at = kind * kWarps + warp_in_block();
    if (lane() == 0) merged.softmax[at] = kinds[kind].softmax;
    store(merged.outputs[at] + channel, kinds[kind].output);
  }
}

// out, lse and lse_seq of a row: a block, in the end with a thread per channel.
template <typename T>
__device__ void combine_row(const AttentionForwardParams& p, const Splits& s, int64_t row) {
  const AttentionInputs& in = p.in;
  const int64_t n = row % in.queries, head = row / in.queries % in.heads, b = row / in.queries / in.heads,
                c = threadIdx.x;
  MergedByWarps& merged = *shared_memory<MergedByWarps>();
  merge_by_warps(in, s, row, merged);
  const float alpha = hr_row_of_query(in, b, n) >= 0 ? mixing<float>(in, b) : 1.f;
  __syncthreads();
  float full, plain;
  const Softmax all = merged.total(2, static_cast<int>(c), full),
                sequence = merged.total(1, static_cast<int>(c), plain);
  if (c == 0) {
    static_cast<float*>(p.lse)[row] = all.log_sum_exp();
    static_cast<float*>(p.lse_seq)[row] = sequence.log_sum_exp();
  }
  if (c >= in.head_dim) return;
  full = all.average(full);
  plain = sequence.average(plain);
  static_cast<T*>(p.out)[((b * in.queries + n) * in.heads + head) * in.head_dim + c] =
      narrow<T>(alpha == 1.f ? full : alpha * full + (1.f - alpha) * plain);
}

// Cells of the map: a block per kThreads cells of one of its rows.
__device__ void combine_map(const AttentionForwardParams& p, const Splits& s, int64_t block) {
  const AttentionInputs& in = p.in;
  const int64_t cells = p.images * p.map_size, blocks = blocks_for(cells, kThreads), map_row = block / blocks;
  const int64_t b = map_row / in.rows, n = query_of_map_row(in, b, map_row % in.rows);
  // p.lse is written by other blocks of this launch.
  float* lse = shared_memory<float>();  // [H]
  for (int64_t head = warp_in_block(); n >= 0 && head < in.heads; head += kWarps) {
    const Softmax* parts = s.softmax + ((b * in.heads + head) * in.queries + n) * s.all;
    const float value = merge_splits(parts, p.map_over_all ? s.all : s.sequence).log_sum_exp();
    if (lane() == 0) lse[head] = value;
  }
  __syncthreads();
  const int64_t index = block % blocks * kThreads + threadIdx.x;
  if (index >= cells) return;
  const MapCell cell = map_cell(p, map_row * cells + index);
  const float* logits = s.logits_of(in, b, cell.r, 0) + cell.key;
  write_map_cell<float, 8>(
      p, cell, [&](int64_t head) { return logits[head * in.keys]; }, [&](int64_t head) { return lse[head]; });
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
         kThreads, Shared<T, kDim, kRows>::bytes(s.chunk), stream, p, s);
}

template <typename T, int kDim>
void launch_splits(const AttentionForwardParams& p, const Splits& s, Stream stream) {
  one_row_per_block(p.in) ? launch_splits<T, kDim, 1>(p, s, stream) : launch_splits<T, kDim, 4>(p, s, stream);
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
  const size_t shared = std::max(sizeof(MergedByWarps), p.in.heads * sizeof(float));
  launch("hierarchical_attention (combine)", combine_splits<T>, rows + map, kThreads, shared, stream, p, s);
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
