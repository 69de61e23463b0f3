// The order in which the blocks of a kernel take the heads of a call and the tiles of each head. Plain C++, so that
// every build can tell.
#pragma once

#include <algorithm>

#include "flexattn/types.h"

namespace flexattn {

struct BlockPlace {
  int head, tile;
};

// Blocks start in the order of their numbers, a few on each multiprocessor at a time. All tiles of a head stream the
// same rows: while the tiles of few heads run together, these rows are read from memory once and stay in the L2 cache.
// So the heads are cut into groups, and the blocks of one group start before those of the next. Within a group tile 0
// of every head starts first, then tile 1: whoever has the longest tiles first leaves the shortest for the end.
struct BlockOrder {
  int heads;     // of the whole batch
  int tiles;     // of each head
  int together;  // heads in a group

  constexpr int64_t blocks() const { return int64_t{heads} * tiles; }

  FLEXATTN_HOST_DEVICE constexpr BlockPlace place(int block) const {
    const int first = block / (together * tiles) * together, rest = block - first * tiles,
              size = heads - first < together ? heads - first : together;
    return {first + rest % size, rest / size};
  }
};

// Groups whose streamed rows fill at most a quarter of the cache: blocks of two groups run at the same time, and what
// they own passes through it too. bytes_per_head: What the tiles of a head stream.
inline BlockOrder order_for_cache(int64_t heads, int64_t tiles, int64_t bytes_per_head, int64_t cache_bytes) {
  const int64_t fit = cache_bytes / 4 / std::max<int64_t>(bytes_per_head, 1);
  return {static_cast<int>(heads), static_cast<int>(tiles),
          static_cast<int>(std::clamp<int64_t>(fit, 1, std::max<int64_t>(heads, 1)))};
}

}  // namespace flexattn
