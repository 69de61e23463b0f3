// Which slot of the pool of high-resolution keys holds which token. A token gets its slot, for good, when it is first
// selected.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct AssignSlotsParams {
  int64_t batch;  // B
  int64_t
      prompts;  // G, a divisor of B: B / G consecutive rows of the batch (beams of a prompt) share a row of the table
  int64_t tokens;        // T
  int64_t selected;      // M
  int64_t capacity;      // slots of the pool, which the whole batch shares
  const int32_t* index;  // [B, M] dense: a token in [0, T), or -1; no token twice in a row of the batch
  const int32_t* count;  // [B]: only the first count[b] of a row are read
  int32_t* table;        // [G, T]: slot of each token, -1 = none yet; read and written
  int64_t table_batch;   // element stride of table; the last dimension is dense
  int32_t* next_free;    // [1]: the slots from here on are free; read and written, never beyond capacity

  // The tokens that have no slot yet take the next ones in the order (b, m), until the pool is full.
  int32_t* slots;       // [B, M]: slot of index[b, m]; -1 where there is no token or no slot was left
  int32_t* new_tokens;  // [B * M]: g * T + token of those that took a slot now, in the order of their slots, then -1
  int32_t* new_slots;   // [B * M]: their slots, then -1
  int32_t* new_count;   // [1]: how many
  int32_t* overflow;    // [1]: how many found no slot
};

namespace cpu {
void assign_slots(const AssignSlotsParams& params, Stream stream);
}
namespace cuda {
void assign_slots(const AssignSlotsParams& params, Stream stream);
}

}  // namespace flexattn
