// Which slot of the pool of high-resolution keys holds which token. A token gets its slot when it is first selected,
// and keeps it.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

struct AssignSlotsParams {
  int64_t batch;  // B
  // G divides B: B / G consecutive rows of the batch, the beams of a prompt, share a row of the table.
  int64_t prompts;
  int64_t tokens;        // T
  int64_t selected;      // M
  int64_t width;         // W <= M: a row may have so many slots
  int64_t capacity;      // slots of the pool, shared by the whole batch
  const int32_t* index;  // [B, M] dense: a token in [0, T), or -1; no token twice in a row of the batch
  const int32_t* count;  // [B]: only the first count[b] of a row are read
  int32_t* table;        // [G, T]: slot of each token, -1 = none yet; updated
  int64_t table_batch;   // element stride of table; the last dimension is dense
  int32_t* next_free;    // [1]: slots from here on are free; updated, never beyond capacity

  // Tokens without a slot take the next free ones in the order (b, m), until the pool is full. Those past the first W
  // of a row find no slot.
  int32_t* slots;       // [B, W]: slot of index[b, m]; -1 where there is no token or the pool was full
  int32_t* usable;      // [B]: count, or 0 everywhere if a token found no slot
  int32_t* new_tokens;  // [B * W]: g * T + token of those that took a slot, in the order of their slots, then -1
  int32_t* new_slots;   // [B * W]: their slots, then -1
  int32_t* new_count;   // [1]: how many took a slot
  int32_t* overflow;    // [1]: how many found none
};

namespace cpu {
void assign_slots(const AssignSlotsParams& params, Stream stream);
}
namespace cuda {
void assign_slots(const AssignSlotsParams& params, Stream stream);
}

}  // namespace flexattn
