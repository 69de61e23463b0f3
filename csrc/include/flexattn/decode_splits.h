// How the decode kernel cuts the keys, from upper bounds that the host knows. Plain C++, so that every build can tell.
#pragma once

#include <cstdint>

#include "flexattn/hierarchical_attention.h"

namespace flexattn {

constexpr int kChunkStep = 64, kMaxChunk = 2048;  // keys in a split: a multiple of the step

// What a decode call has to share out, and among how many blocks.
struct DecodeWork {
  int64_t heads;         // key heads of the whole batch, B * Hkv: each has splits of its own
  int64_t sequence, hr;  // keys of each kind
  int64_t wave;          // blocks that the GPU runs at a time
};

struct DecodeSplits {
  int chunk;          // keys in a split
  int sequence, all;  // splits of the sequence; of sequence and HR keys
};

constexpr DecodeSplits cut_keys(const DecodeWork& work, int chunk) {
  const auto splits = [chunk](int64_t keys) { return static_cast<int>((keys + chunk - 1) / chunk); };
  return {chunk, splits(work.sequence), splits(work.sequence) + splits(work.hr)};
}

// The splits that take the fewest steps: as many waves as their blocks need, each of a chunk and the overhead of a
// block; of several, those with the fewest blocks to combine. That is one wave, unless the heads would leave much of it
// empty.
constexpr DecodeSplits choose_splits(const DecodeWork& work) {
  constexpr int64_t kOverhead = kChunkStep / 2;  // of a block, and of its part in the combination, in keys
  DecodeSplits best{};
  int64_t fewest = INT64_MAX;
  for (int chunk = kChunkStep; chunk <= kMaxChunk; chunk += kChunkStep) {
    const DecodeSplits splits = cut_keys(work, chunk);
    const int64_t waves = (work.heads * splits.all + work.wave - 1) / work.wave, steps = waves * (chunk + kOverhead);
    if (steps <= fewest) best = splits, fewest = steps;
    if (work.sequence <= chunk && work.hr <= chunk) break;
  }
  return best;
}

// Whether a block serves one row, a query of a head with keys of its own. It then takes fewer registers.
inline bool one_row_per_block(const AttentionInputs& in) { return in.heads == in.kv_heads && in.queries == 1; }

inline DecodeWork decode_work(const AttentionInputs& in, int multiprocessors) {
  // A range that reaches back beyond the window may have any length.
  const bool short_window = in.window && !in.ranges && in.window + in.queries <= in.keys;
  return {in.batch * in.kv_heads, short_window ? in.window + in.queries - 1 : in.keys, in.k_hr ? in.selected : 0,
          int64_t{multiprocessors} * (one_row_per_block(in) ? 3 : 2)};
}

}  // namespace flexattn
