// One block walks over the selected tokens of the batch in order, so that every run numbers the slots alike.

#include "flexattn/assign_slots.h"
#include "require.cuh"
#include "warp.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kThreads = 1024;

// Shared memory: an int per warp.
__global__ void __launch_bounds__(kThreads) number_new_tokens(AssignSlotsParams p) {
  int* scratch = shared_memory<int>();
  const int64_t free = *p.next_free;
  require("assign_slots: next_free", free, 0, p.capacity);
  const int64_t left = p.capacity - free;
  int64_t wanted = 0;  // new tokens so far, including those that found the pool full
  int64_t beyond = 0;  // tokens so far that a row has no room for
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = p.count[b];
    require("assign_slots: count", count, 0, p.selected);
    const int32_t* index = p.index + b * p.selected;
    const int64_t prompt = b / (p.batch / p.prompts);
    int32_t* table = p.table + prompt * p.table_batch;
    int32_t* slots = p.slots + b * p.width;
    const int64_t kept = min(count, p.width);
    beyond += count - kept;
    for (int64_t m0 = 0; m0 < kept; m0 += kThreads) {
      const int64_t m = m0 + threadIdx.x;
      const int32_t token = m < kept ? index[m] : -1;
      require("assign_slots: index", token, -1, p.tokens - 1);
      int32_t slot = token < 0 ? -1 : table[token];
      require("assign_slots: table", slot, -1, p.capacity - 1);
      const bool wants = token >= 0 && slot < 0;
      const Rank rank = block_rank(wants, scratch);
      const int64_t n = wanted + rank.before;
      if (wants && n < left) {
        slot = static_cast<int32_t>(free + n);
        table[token] = slot;
        p.new_tokens[n] = static_cast<int32_t>(prompt * p.tokens + token);
        p.new_slots[n] = slot;
      }
      if (m < kept) slots[m] = slot;
      wanted += rank.total;
    }
    for (int64_t m = kept + threadIdx.x; m < p.width; m += kThreads) slots[m] = -1;
    __syncthreads();  // the next row may read what this one wrote to the table
  }
  const int64_t taken = wanted < left ? wanted : left, overflow = wanted - taken + beyond;
  for (int64_t n = taken + threadIdx.x; n < p.batch * p.width; n += kThreads) p.new_tokens[n] = p.new_slots[n] = -1;
  for (int64_t b = threadIdx.x; b < p.batch; b += kThreads) p.usable[b] = overflow ? 0 : p.count[b];
  __syncthreads();  // every thread has read next_free
  if (threadIdx.x == 0) {
    *p.next_free = static_cast<int32_t>(free + taken);
    *p.new_count = static_cast<int32_t>(taken);
    *p.overflow = static_cast<int32_t>(overflow);
  }
}

}  // namespace

void assign_slots(const AssignSlotsParams& params, Stream stream) {
  launch("assign_slots", number_new_tokens, 1, kThreads, kThreads / kWarp * sizeof(int), stream, params);
}

}  // namespace flexattn::cuda
