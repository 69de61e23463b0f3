// Gather the selected rows of the high-resolution features, and scatter their gradient back.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct GatherTokensParams {
  int64_t element_size;  // 2, 4 or 8 bytes; the operator moves bits and never looks at a value
  int64_t batch;         // B
  int64_t tokens;        // T
  int64_t selected;      // M
  int64_t channels;      // D
  const int32_t* index;  // [B, M] dense: a token in [0, T), or -1; no token twice in a row of the batch
  const void* source;    // gather: tokens [B, T, D]; scatter: gradient [B, M, D]
  int64_t source_batch;  // element strides of source; the last dimension is dense
  int64_t source_row;
  // gather: [B, M, D] dense, zero where the index is -1; scatter: [B, T, D] dense, zero for unselected tokens.
  void* result;
};

namespace cpu {
void gather_tokens(const GatherTokensParams& params, Stream stream);
void scatter_tokens(const GatherTokensParams& params, Stream stream);
}  // namespace cpu
namespace cuda {
void gather_tokens(const GatherTokensParams& params, Stream stream);
void scatter_tokens(const GatherTokensParams& params, Stream stream);
}  // namespace cuda

}  // namespace flexattn
