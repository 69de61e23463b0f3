#include "flexattn/assign_slots.h"

#include <algorithm>

namespace flexattn::cpu {

void assign_slots(const AssignSlotsParams& p, Stream) {
  const int64_t entries = p.batch * p.selected;
  std::fill_n(p.slots, entries, -1);
  std::fill_n(p.new_tokens, entries, -1);
  std::fill_n(p.new_slots, entries, -1);
  *p.new_count = *p.overflow = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t prompt = b / (p.batch / p.prompts);
    for (int64_t m = 0; m < p.count[b]; ++m) {
      const int64_t at = b * p.selected + m, token = p.index[at];
      if (token < 0) continue;
      int32_t& slot = p.table[prompt * p.table_batch + token];
      if (slot < 0 && *p.next_free < p.capacity) {
        slot = (*p.next_free)++;
        const int32_t n = (*p.new_count)++;
        p.new_tokens[n] = static_cast<int32_t>(prompt * p.tokens + token);
        p.new_slots[n] = slot;
      }
      p.slots[at] = slot;
      *p.overflow += slot < 0;
    }
  }
}

}  // namespace flexattn::cpu
