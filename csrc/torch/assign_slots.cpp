#include "flexattn/assign_slots.h"

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "device.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

using at::Tensor;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void check_table(Reasons& reasons, const Tensor& index, const Tensor& table, int64_t capacity) {
  if (!reasons.tensor("table", table, {-1, -1}, kInt, index.device())) return;
  const int64_t B = index.size(0), G = table.size(0), T = table.size(1);
  reasons.unless(G == B || (G > 0 && B % G == 0), "table has ", G, " rows, expected a divisor of the ", B,
                 " rows of index");
  reasons.unless(G * T <= kMaxInt32, "table has ", G * T, " entries, expected at most 2^31 - 1");
  reasons.values_within("table", table, -1, capacity - 1);
  reasons.values_within("index", index, -1, T - 1);
  if (reasons.ok()) reasons.distinct_in_rows("index", index, T);
}

void check_written(Reasons& reasons, const Tensor& index, const Tensor& count, const Tensor& table,
                   const Tensor& next_free) {
  reasons.writable("table", table);
  reasons.writable("next_free", next_free);
  reasons.disjoint("table", table, "next_free", next_free);
  reasons.disjoint("table", table, "index", index);
  reasons.disjoint("table", table, "count", count);
  reasons.disjoint("next_free", next_free, "index", index);
  reasons.disjoint("next_free", next_free, "count", count);
}

void check(const Tensor& index, const Tensor& count, const Tensor& table, const Tensor& next_free, int64_t capacity,
           int64_t width) {
  Reasons reasons("assign_slots");
  const at::Device device = index.device();
  reasons.tensor("index", index, {-1, -1}, kInt, device);
  reasons.raise_if_any();
  const int64_t B = index.size(0), M = index.size(1);
  check_written(reasons, index, count, table, next_free);
  reasons.raise_if_any();
  if (reasons.tensor("count", count, {B}, kInt, device)) reasons.values_within("count", count, 0, M);
  check_table(reasons, index, table, capacity);
  if (reasons.tensor("next_free", next_free, {1}, kInt, device))
    reasons.values_within("next_free", next_free, 0, capacity);
  reasons.unless(capacity >= 0 && capacity <= kMaxInt32, "capacity is ", capacity, ", expected 0 to 2^31 - 1");
  reasons.unless(width >= 0 && width <= M, "width is ", width, ", expected 0 to the ", M, " columns of index");
  reasons.raise_if_any();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> assign_slots(const Tensor& given_index,
                                                                        const Tensor& given_count, Tensor& table,
                                                                        Tensor& next_free, int64_t capacity,
                                                                        int64_t width) {
  const NvtxRange range("assign_slots");
  const Tensor index = without_negation(given_index), count = without_negation(given_count);
  check(index, count, table, next_free, capacity, width);
  const int64_t B = index.size(0), M = index.size(1);
  const auto options = index.options();
  const Tensor slots = at::empty({B, width}, options), usable = at::empty({B}, options);
  const Tensor new_tokens = at::empty({B * width}, options), new_slots = at::empty({B * width}, options);
  const Tensor new_count = at::empty({1}, options), overflow = at::empty({1}, options);
  const Tensor dense_index = index.contiguous(), dense_count = count.contiguous();

  AssignSlotsParams params{};
  params.batch = B;
  params.prompts = table.size(0);
  params.tokens = table.size(1);
  params.selected = M;
  params.width = width;
  params.capacity = capacity;
  params.index = ints(dense_index);
  params.count = ints(dense_count);
  params.table = mutable_ints(table);
  params.table_batch = table.stride(0);
  params.next_free = mutable_ints(next_free);
  params.slots = mutable_ints(slots);
  params.usable = mutable_ints(usable);
  params.new_tokens = mutable_ints(new_tokens);
  params.new_slots = mutable_ints(new_slots);
  params.new_count = mutable_ints(new_count);
  params.overflow = mutable_ints(overflow);
  FLEXATTN_LAUNCH(assign_slots, params, index);
  return {slots, usable, new_tokens, new_slots, new_count, overflow};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flexattn_cuda, library) {
  library.def(
      "assign_slots(Tensor index, Tensor count, Tensor(a!) table, Tensor(b!) next_free, SymInt capacity, SymInt width) "
      "-> (Tensor slots, Tensor usable, Tensor new_tokens, Tensor new_slots, Tensor new_count, Tensor overflow)");
}
TORCH_LIBRARY_IMPL(flexattn_cuda, CPU, library) { library.impl("assign_slots", &assign_slots); }
TORCH_LIBRARY_IMPL(flexattn_cuda, CUDA, library) { library.impl("assign_slots", &assign_slots); }

}  // namespace flexattn::torch_binding
