#include "flexattn/gather_tokens.h"

#include <ATen/Parallel.h>

#include <cstring>

namespace flexattn::cpu {

void gather_tokens(const GatherTokensParams& p, Stream) {
  const int64_t bytes = p.channels * p.element_size;
  at::parallel_for(0, p.batch * p.selected, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* row = static_cast<char*>(p.result) + i * bytes;
      const int64_t token = p.index[i];
      if (token < 0) {
        std::memset(row, 0, bytes);
        continue;
      }
      const int64_t at = i / p.selected * p.source_batch + token * p.source_row;
      std::memcpy(row, static_cast<const char*>(p.source) + at * p.element_size, bytes);
    }
  });
}

void scatter_tokens(const GatherTokensParams& p, Stream) {
  const int64_t bytes = p.channels * p.element_size;
  std::memset(p.result, 0, p.batch * p.tokens * bytes);
  at::parallel_for(0, p.batch * p.selected, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.selected, m = i % p.selected, token = p.index[i];
      if (token < 0) continue;
      const int64_t at = b * p.source_batch + m * p.source_row;
      std::memcpy(static_cast<char*>(p.result) + (b * p.tokens + token) * bytes,
                  static_cast<const char*>(p.source) + at * p.element_size, bytes);
    }
  });
}

}  // namespace flexattn::cpu
