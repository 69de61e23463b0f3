// N x (N+M) attention on tensor cores (float16, bfloat16; head sizes up to 128), as FlashAttention streams it: a block
// owns 64 query rows of one head, a warp 16 of them, and tiles of 64 keys pass by, those of the sequence first, then
// the sample's high-resolution keys. Scores, probabilities and outputs stay in registers.
//
//   for each tile:   S = Q K^T        meanwhile V of this tile comes in
//                    softmax          (registers)
//                    O += P V         meanwhile K of the next tile comes in
//
// K and V have one buffer each: while one is multiplied, the other is filled.
#pragma once

#include "attention_tiles.cuh"

namespace flexattn::cuda {

// What a block has to do. It lies in shared memory, since registers are what this kernel has least of.
struct BlockWork {
  int sample, head, kv_head;
  int first_row, rows;         // query rows
  int first_position;          // of first_row
  int first_key, end_of_keys;  // of the sequence, for the last row
  int hr_count,
      hr_from;  // HR keys, 0 where no row of the block sees them; rows from hr_from on do, unless rows are listed
  int sequence_tiles, tiles;  // tiles of the sequence; of both parts
  int place[kTileRows];       // of a row in hr_rows (without hr_rows: 0 for the last query), or -1

  __device__ KeyTile tile(int t) const {
    if (t < sequence_tiles) return {false, first_key + t * kTileKeys, end_of_keys};
    return {true, (t - sequence_tiles) * kTileKeys, hr_count};
  }
};

// Keys, values, work, and a bit per HR tile: whether some row sees a key of it (only with hr_row_bits).
template <typename Mma>
constexpr size_t prefill_shared_bytes(int64_t selected) {
  return 2 * kTileKeys * Mma::kRowChunks * 16 + sizeof(BlockWork) + words_for_bits(blocks_for(selected, kTileKeys)) * 4;
}

__device__ inline void describe_work(const AttentionInputs& in, BlockWork& work, int32_t* used) {
  const int queries = static_cast<int>(in.queries);
  if (threadIdx.x == 0) {
    // The longest rows first: they end last.
    const int heads = static_cast<int>(in.heads), samples = static_cast<int>(in.batch),
              blocks = static_cast<int>(gridDim.x);
    const int block = blocks - 1 - static_cast<int>(blockIdx.x), sample = block / heads % samples;
    work.sample = sample;
    work.head = block % heads;
    work.kv_head = work.head / static_cast<int>(in.heads / in.kv_heads);
    work.first_row = block / (heads * samples) * kTileRows;
    work.rows = min(kTileRows, queries - work.first_row);
    work.first_position = static_cast<int>(first_position(in, sample)) + work.first_row;
    work.first_key = static_cast<int>(first_key(in, sample));
    work.end_of_keys = work.first_position + work.rows;
    work.hr_from = in.hr_from ? in.hr_from[sample] : queries;
    work.hr_count = static_cast<int>(hr_keys(in, sample));
    work.sequence_tiles = static_cast<int>(blocks_for(max(0, work.end_of_keys - work.first_key), kTileKeys));
  }
  __syncthreads();
  for (int r = threadIdx.x; r < kTileRows; r += kTileThreads)
    work.place[r] = !in.hr_rows && work.first_row + r == queries - 1 ? 0 : -1;
  __syncthreads();
  bool any = in.hr_from && work.first_row + work.rows > work.hr_from;
  if (in.hr_rows) {
    for (int r = threadIdx.x; r < in.rows; r += kTileThreads) {
      const int n = static_cast<int>(row_at(in, work.sample, r)) - work.first_row;
      if (n >= 0 && n < work.rows) work.place[n] = r;
    }
    __syncthreads();
    for (int r = 0; r < kTileRows; ++r) any |= work.place[r] >= 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!any) work.hr_count = 0;
    work.tiles = work.sequence_tiles + static_cast<int>(blocks_for(work.hr_count, kTileKeys));
  }
  __syncthreads();
  if (!in.hr_row_bits) return;
  const int hr_tiles = work.tiles - work.sequence_tiles;
  for (int word = threadIdx.x; word * kBitsPerWord < hr_tiles; word += kTileThreads) {
    uint32_t seen = 0;
    for (int r = 0; r < work.rows; ++r)
      for (int t = 0; work.place[r] >= 0 && t < kBitsPerWord && word * kBitsPerWord + t < hr_tiles; ++t) {
        const int first = (word * kBitsPerWord + t) * kTileKeys;
        if (bits_from(row_bits(in, work.sample, work.place[r]), first, in.selected)) seen |= 1u << t;
      }
    used[word] = static_cast<int32_t>(seen);
  }
  __syncthreads();
}

template <typename Mma, int kD>
__global__ void __launch_bounds__(kTileThreads, 2) prefill_tiles(AttentionForwardParams p) {
  using T = typename Mma::Element;
  const AttentionInputs& in = p.in;
  const int d = static_cast<int>(in.head_dim);
  T* keys = shared_memory<T>();
  T* values = keys + kTileKeys * Mma::kRowChunks * 8;
  BlockWork& work = *reinterpret_cast<BlockWork*>(values + kTileKeys * Mma::kRowChunks * 8);
  int32_t* used = reinterpret_cast<int32_t*>(&work + 1);
  describe_work(in, work, used);
  // The first tile from t on of which some row sees a key.
  auto next_used = [&](int t) {
    while (in.hr_row_bits && t >= work.sequence_tiles && t < work.tiles && !bit(used, t - work.sequence_tiles)) ++t;
    return t;
  };

  // --------------------------------------------------------------------------------------------- this lane's two rows
  const int warp_row = warp_in_block() * kWarpRows;
  auto row = [&](int which) { return warp_row + Mma::row(which); };
  auto sees_hr = [&](int which) {
    return in.hr_rows ? work.place[row(which)] >= 0 : work.first_row + row(which) >= work.hr_from;
  };

  Mma mma;
  mma.load_query(
      [&](int r) {
        return row_of<T>(in.q, in.q_strides, work.sample, work.head,
                         min(work.first_row + warp_row + r, static_cast<int>(in.queries) - 1));
      },
      d);

  auto rows_of = [&](const KeyTile& tile, const void* sequence, const Strides& strides, const void* pool,
                     const Strides& pool_strides) {
    return tile.hr
               ? TileRows<T>{row_of<T>(pool, pool_strides, 0, work.kv_head, 0), pool_strides.row,
                             in.hr_slots + static_cast<int64_t>(work.sample) * in.selected, tile.first, tile.end - 1}
               : TileRows<T>{row_of<T>(sequence, strides, work.sample, work.kv_head, 0), strides.row, nullptr,
                             tile.first, tile.end - 1};
  };
  auto key_rows = [&](const KeyTile& tile) { return rows_of(tile, in.k, in.k_strides, in.k_hr, in.k_hr_strides); };
  auto value_rows = [&](const KeyTile& tile) { return rows_of(tile, in.v, in.v_strides, in.v_hr, in.v_hr_strides); };
  auto key_place = [](int r, int c) { return Mma::key_chunk(r, c); };
  auto value_place = [](int r, int c) { return Mma::value_chunk(r, c); };

  const float scale = static_cast<float>(in.scale), scale_log2 = scale * 1.4426950408889634f;
  float out[Mma::kOutputs] = {};
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // of unscaled scores; each lane sums its own columns

  // Writes share * out + keep * what stands there.
  auto write_out = [&](const float (&share)[2], const float (&keep)[2]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (row(which) >= work.rows) continue;
      T* to = static_cast<T*>(p.out) +
              ((work.sample * in.queries + work.first_row + row(which)) * in.heads + work.head) * d +
              Mma::channel_of_lane();
#pragma unroll
      for (int i = 0; i < Mma::kOutputs; i += 2) {  // two neighbouring channels
        if (Mma::row_of(i) != which || Mma::channel_of_output(i) + Mma::channel_of_lane() >= d) continue;
        T* at = to + Mma::channel_of_output(i);
        float pair[2] = {share[which] * out[i], share[which] * out[i + 1]};
        if (keep[which] != 0.f) pair[0] += keep[which] * widen(at[0]), pair[1] += keep[which] * widen(at[1]);
        alignas(4) const T both[2] = {narrow<T>(pair[0]), narrow<T>(pair[1])};
        *reinterpret_cast<uint32_t*>(at) = *reinterpret_cast<const uint32_t*>(both);
      }
    }
  };
  // Writes the log-sum-exps of the lane's rows; what their outputs must be multiplied with.
  auto finish = [&](void* lse, float (&inverse)[2]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float total = Mma::over_row(sum[which], [](float x, float y) { return x + y; });
      inverse[which] = total == 0.f ? 0.f : 1.f / total;
      if (Mma::first_of_row() && row(which) < work.rows)
        static_cast<float*>(lse)[(work.sample * in.heads + work.head) * in.queries + work.first_row + row(which)] =
            total == 0.f ? -INFINITY : largest[which] * scale + logf(total);
    }
  };
  // alpha: the sequence alone leaves its output, which is mixed in at the end.
  const bool mixed = work.hr_count > 0 && mixing<float>(in, work.sample) != 1.f;
  auto sequence_done = [&]() {
    float inverse[2];
    finish(p.lse_seq, inverse);
    if (mixed) write_out(inverse, {0.f, 0.f});
  };

  TileCopy<Mma, kD> copy;
  int t = next_used(0);
  if (t < work.tiles) {
    const TileRows<T> rows = key_rows(work.tile(t));
    unrolled<Mma::kParts>([&](auto part) {
      copy.template issue<part.value>(rows, d, keys, key_place);
      copy.template commit<part.value>(keys, key_place);
    });
  }
  if (work.sequence_tiles == 0) sequence_done();
  __syncthreads();

  while (t < work.tiles) {
    const KeyTile tile = work.tile(t);

    float s[Mma::kScores] = {};
    const TileRows<T> rows = value_rows(tile);
    copy.template issue<0>(rows, d, values, value_place);
    unrolled<Mma::kParts>([&](auto part) {
      mma.template multiply_keys<part.value>(s, keys);
      copy.template commit<part.value>(values, value_place);
      if constexpr (part.value + 1 < Mma::kParts) copy.template issue<part.value + 1>(rows, d, values, value_place);
    });
    __syncthreads();  // V is there; K is no longer read

    const int next = next_used(t + 1);
    const TileRows<T> next_rows = key_rows(work.tile(next));
    if (next < work.tiles) copy.template issue<0>(next_rows, d, keys, key_place);

    const bool whole =
        tile.hr ? in.hr_from && !in.hr_row_bits && work.first_row >= work.hr_from && tile.first + kTileKeys <= tile.end
                : !in.key_mask && tile.first + kTileKeys <= work.first_position + 1;
    if (!whole) {
      uint64_t visible[2];
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (tile.hr) {
          visible[which] = sees_hr(which) ? low_bits(tile.end - tile.first) : 0;
          if (in.hr_row_bits && visible[which])
            visible[which] &= bits_from(row_bits(in, work.sample, work.place[row(which)]), tile.first, in.selected);
        } else {
          visible[which] = low_bits(min(work.first_position + row(which) + 1, tile.end) - tile.first);
          if (in.key_mask)
            visible[which] &= bits_from(in.key_mask + work.sample * words_for_bits(in.keys), tile.first, in.keys);
        }
        visible[which] >>= Mma::key_of_lane();
      }
#pragma unroll
      for (int i = 0; i < Mma::kScores; ++i)
        if (!(visible[Mma::row_of(i)] >> Mma::key_of_score(i) & 1)) s[i] = -INFINITY;
    }

    if (!tile.hr && p.workspace) {
      // Logits of the rows with a map [B, R, H, I, S*S]; map_of_logits makes it.
      for (int image = 0; image < p.images; ++image) {
        const int32_t* range = p.map_ranges + (work.sample * p.images + image) * 2;
        const int ahead = tile.first + Mma::key_of_lane() - range[0];
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const int place = work.place[row(which)];
          if (place < 0) continue;
          float* to = static_cast<float*>(p.workspace) +
                      (((work.sample * in.rows + place) * in.heads + work.head) * p.images + image) * p.map_size +
                      ahead;
          const uint64_t wanted = low_bits(range[1] - range[0] - ahead) & ~low_bits(-ahead);
#pragma unroll
          for (int i = 0; i < Mma::kScores; ++i)
            if (Mma::row_of(i) == which && (wanted >> Mma::key_of_score(i) & 1))
              to[Mma::key_of_score(i)] = s[i] * scale;
        }
      }
    }

    float factor[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float highest = largest[which];
#pragma unroll
      for (int i = 0; i < Mma::kScores; ++i)
        if (Mma::row_of(i) == which) highest = fmaxf(highest, s[i]);
      highest = Mma::over_row(highest, [](float x, float y) { return fmaxf(x, y); });
      // Rows that have seen nothing so far: exp(-inf - -inf) is no number.
      const float shift = highest == -INFINITY ? 0.f : highest * scale_log2;
      factor[which] = exp2f(largest[which] * scale_log2 - shift);
      largest[which] = highest;
      sum[which] *= factor[which];
#pragma unroll
      for (int i = 0; i < Mma::kScores; ++i)
        if (Mma::row_of(i) == which) {
          s[i] = exp2f(s[i] * scale_log2 - shift);
          sum[which] += s[i];
        }
    }
#pragma unroll
    for (int i = 0; i < Mma::kOutputs; ++i) out[i] *= factor[Mma::row_of(i)];

    unrolled<Mma::kParts>([&](auto part) {
      Mma::template multiply_values<part.value>(out, s, values);
      if (next == work.tiles) return;
      copy.template commit<part.value>(keys, key_place);
      if constexpr (part.value + 1 < Mma::kParts) copy.template issue<part.value + 1>(next_rows, d, keys, key_place);
    });
    __syncthreads();  // the next K is there; V is no longer read

    if (!tile.hr && (next >= work.sequence_tiles)) sequence_done();
    t = next;
  }

  float share[2], keep[2] = {0.f, 0.f};
  finish(p.lse, share);
#pragma unroll
  for (int which = 0; which < 2; ++which)
    if (mixed && sees_hr(which)) {
      const float alpha = mixing<float>(in, work.sample);
      share[which] *= alpha;
      keep[which] = 1.f - alpha;
    }
  write_out(share, keep);
}

}  // namespace flexattn::cuda
