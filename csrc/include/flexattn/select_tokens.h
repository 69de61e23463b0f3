// From the attention map of one layer to the high-resolution tokens that the next layer sees (section 4.2 of the
// paper). Every image has grids of its own; what is said of an image's cells or tokens holds for its own width.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct SelectTokensParams {
  DType dtype;                // of map: float32 or float64; all arithmetic is done in it
  const void* map;            // [B, R, I, C] dense; an image's rows * cols cells come first, what follows is not read
  const int32_t* lr_grid;     // [B, I, 2] dense: rows and columns, at most C cells; an image without cells is absent
  const int32_t* pool_grid;   // [B, I, 2] dense: the grid of the adaptive max-pool; null = no pooling
  const int32_t* hr_grid;     // [B, I, 2] dense: rows and columns, at most T tokens
  const int32_t* valid_rect;  // [B, I, 4] dense: top, left, bottom, right of the image inside its padding, in LR cells,
                              // half-open; null = the whole grid
  int64_t batch;              // B
  int64_t rows;               // R: query rows with a map of their own
  int64_t images;             // I
  int64_t cells;              // C
  int64_t hr_tokens;          // T: tokens that an image is given room for
  double scale;               // a cell is chosen where a * scale > threshold; a in [0, 1] is the min-max normalised map
  double threshold;

  int32_t* chosen;      // workspace [B, R, I, ceil(C / 32)]: bit per (pooled) cell that a row chooses
  int32_t* any_chosen;  // workspace [B, I, ceil(C / 32)]: those that some row chooses

  int32_t* index;     // [B, I*T]: image * T + token of every token that some row selects, ascending, then -1
  int32_t* count;     // [B]: how many tokens are selected
  int32_t* row_bits;  // [B, R, ceil(I*T / 32)]: bit m of row r is set if row r selects index[m]
};

struct GridSize {
  int rows, cols;
  FLEXATTN_HOST_DEVICE int cells() const { return rows * cols; }
};

// Rows or columns `begin` to `end` - 1.
struct Window {
  int begin, end;
};

// What number i of `to` pooled rows or columns covers of `from`: the window of torch's adaptive pooling.
FLEXATTN_HOST_DEVICE inline Window adaptive_window(int i, int from, int to) {
  const int64_t begin = static_cast<int64_t>(i) * from, end = static_cast<int64_t>(i + 1) * from;
  return {static_cast<int>(begin / to), static_cast<int>((end + to - 1) / to)};
}

// The grids of one image. An absent one has no HR tokens.
struct SelectionGrids {
  GridSize lr, pooled, hr;  // without pooling, `pooled` is the LR grid
};

// image: a number in [B, I].
FLEXATTN_HOST_DEVICE inline SelectionGrids grids_of(const SelectTokensParams& p, int64_t image) {
  const auto size = [&](const int32_t* grid) { return GridSize{grid[2 * image], grid[2 * image + 1]}; };
  const GridSize lr = size(p.lr_grid);
  return {lr, p.pool_grid ? size(p.pool_grid) : lr, lr.cells() ? size(p.hr_grid) : GridSize{0, 0}};
}

namespace cpu {
void select_tokens(const SelectTokensParams& params, Stream stream);
}
namespace cuda {
void select_tokens(const SelectTokensParams& params, Stream stream);
}

}  // namespace flexattn
