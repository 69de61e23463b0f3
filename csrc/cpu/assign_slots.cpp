#include "flexattn/assign_slots.h"

#include <algorithm>

namespace flexattn::cpu {

void assign_slots(const AssignSlotsParams& p, Stream) {
  const int64_t entries = p.batch * p.width;
  std::fill_n(p.slots, entries, -1);
  std::fill_n(p.new_tokens, entries, -1);
  std::fill_n(p.new_slots, entries, -1);
  *p.new_count = *p.overflow = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t prompt = b / (p.batch / p.prompts);
    const int64_t kept = std::min<int64_t>(p.count[b], p.width);
    *p.overflow += static_cast<int32_t>(p.count[b] - kept);
    for (int64_t m = 0; m < kept; ++m) {
      const int64_t token = p.index[b * p.selected + m];
      if (token < 0) continue;
      int32_t& slot = p.table[prompt * p.table_batch + token];
      if (slot < 0 && *p.next_free < p.capacity) {
        slot = (*p.next_free)++;
        const int32_t n = (*p.new_count)++;
        p.new_tokens[n] = static_cast<int32_t>(prompt * p.tokens + token);
        p.new_slots[n] = slot;
      }
      p.slots[b * p.width + m] = slot;
      *p.overflow += slot < 0;
    }
  }
  for (int64_t b = 0; b < p.batch; ++b) p.usable[b] = *p.overflow ? 0 : p.count[b];
}

}  // namespace flexattn::cpu
