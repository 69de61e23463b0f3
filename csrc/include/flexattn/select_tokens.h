// From the attention map of one layer to the high-resolution tokens that the next layer sees (section 4.2 of the
// paper).
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct SelectTokensParams {
  DType dtype;      // of map: float32 or float64; all arithmetic is done in it
  const void* map;  // [B, R, I, S*S] dense
  // [B, I, 4] dense: top, left, bottom, right of the image inside its padding, in LR cells, half-open.
  const int32_t* valid_rect;
  int64_t batch;      // B
  int64_t rows;       // R: query rows with a map of their own
  int64_t images;     // I
  int64_t lr_side;    // S
  int64_t hr_side;    // h
  int64_t pool_side;  // side of the grid of the adaptive max-pool; 0 = no pooling
  double scale;       // a cell is chosen where a * scale > threshold; a in [0, 1] is the min-max normalised map
  double threshold;

  bool* mask;         // [B, R, I, h*h]: what each row selects
  int32_t* index;     // [B, I*h*h]: image * h*h + token of every token that some row selects, ascending, then -1
  int32_t* count;     // [B]: how many tokens are selected
  int32_t* row_bits;  // [B, R, ceil(I*h*h / 32)]: bit m of row r is set if row r selects index[m]
};

namespace cpu {
void select_tokens(const SelectTokensParams& params, Stream stream);
}
namespace cuda {
void select_tokens(const SelectTokensParams& params, Stream stream);
}

}  // namespace flexattn
