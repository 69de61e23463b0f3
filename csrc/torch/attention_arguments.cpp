#include "attention_arguments.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace flexattn::torch_binding {
namespace {

bool has_pool(const AttentionArguments& a) { return a.k_hr.has_value(); }

// M: HR keys per sample.
int64_t selected(const AttentionArguments& a) { return a.hr_slots ? a.hr_slots->size(1) : 0; }

// R: rows with a map of their own.
int64_t rows(const AttentionArguments& a) { return a.hr_rows ? a.hr_rows->size(1) : 1; }

// Raises at once: every other check needs the sizes of q and k.
void check_queries_and_keys(Reasons& reasons, const AttentionArguments& a) {
  const at::Device device = a.q.device();
  reasons.tensor("q", a.q, {-1, -1, -1, -1}, kFloatingPoint, device);
  reasons.raise_if_any();
  const at::ScalarType dtype[] = {a.q.scalar_type()};
  const int64_t B = a.q.size(0), H = a.q.size(1), N = a.q.size(2), d = a.q.size(3);
  reasons.tensor("k", a.k, {B, -1, -1, d}, dtype, device);
  reasons.raise_if_any();
  const int64_t Hkv = a.k.size(1), Nk = a.k.size(2);
  reasons.unless(H > 0 && Hkv > 0 && H % Hkv == 0, "q has ", H, " heads, expected at least 1, a multiple of k's ", Hkv);
  reasons.unless(N > 0 && d > 0, "q has shape ", a.q.sizes(), ", expected at least 1 query and head_dim 1");
  reasons.unless(N <= Nk, "q has ", N, " queries, expected at most the ", Nk, " of k's keys");
  reasons.tensor("v", a.v, {B, Hkv, Nk, d}, dtype, device);
}

void check_visible_keys(Reasons& reasons, const AttentionArguments& a) {
  const int64_t B = a.q.size(0), N = a.q.size(2), Nk = a.k.size(2);
  if (reasons.tensor("kv_start", a.kv_start, {B}, kInt, a.q.device()))
    reasons.values_within("kv_start", a.kv_start, 0, Nk);
  if (reasons.tensor("kv_len", a.kv_len, {B}, kInt, a.q.device())) reasons.values_within("kv_len", a.kv_len, N, Nk);
  reasons.tensor("key_mask", a.key_mask, {B, words_for_bits(Nk)}, kInt, a.q.device());
}

// Each sample's ranges ascend, do not overlap, and end at kv_len, at the latest; those that are empty may be anywhere.
void check_range_values(Reasons& reasons, const AttentionArguments& a) {
  const at::Tensor& ranges = *a.bidirectional_ranges;
  if (!readable(ranges) || !readable(a.kv_len)) return;
  for (int64_t b = 0; b < ranges.size(0); ++b) {
    int32_t last_end = 0;
    for (int64_t g = 0; g < ranges.size(1); ++g) {
      const int32_t *range = ints(ranges) + (b * ranges.size(1) + g) * 2, begin = range[0], end = range[1];
      reasons.unless(0 <= begin && begin <= end && end <= ints(a.kv_len)[b], "bidirectional_ranges has the range [",
                     begin, ", ", end, ") in sample ", b, ", expected 0 <= begin <= end <= kv_len, which is ",
                     ints(a.kv_len)[b]);
      if (begin == end) continue;
      reasons.unless(last_end <= begin, "bidirectional_ranges has a range that begins at ", begin,
                     " after one that ends at ", last_end, " in sample ", b,
                     ", expected ascending ranges that do not overlap");
      last_end = end;
    }
  }
}

void check_ranges_and_caps(Reasons& reasons, const AttentionArguments& a) {
  reasons.unless(a.window >= 0, "window is ", a.window, ", expected a number of keys, or 0 for no limit");
  reasons.unless(a.softcap >= 0 && std::isfinite(a.softcap), "softcap is ", a.softcap,
                 ", expected a positive number, or 0 for none");
  if (reasons.tensor("bidirectional_ranges", a.bidirectional_ranges, {a.q.size(0), -1, 2}, kInt, a.q.device()) &&
      reasons.ok())
    check_range_values(reasons, a);
}

// The first hr_count slots of each sample lie in the pool, no slot twice.
void check_slots(Reasons& reasons, const AttentionArguments& a) {
  if (!readable(*a.hr_slots) || !readable(*a.hr_count)) return;
  const int64_t B = a.q.size(0), P = a.k_hr->size(0);
  for (int64_t b = 0; b < B; ++b) {
    const at::Tensor used = a.hr_slots->select(0, b).narrow(0, 0, ints(a.hr_count)[b]);
    reasons.values_within("hr_slots", used, 0, P - 1);
    if (reasons.ok()) reasons.distinct_in_rows("hr_slots", used.unsqueeze(0), P);
  }
}

void check_pool(Reasons& reasons, const AttentionArguments& a) {
  const int given = a.k_hr.has_value() + a.v_hr.has_value() + a.hr_slots.has_value() + a.hr_count.has_value();
  reasons.unless(given == 0 || given == 4, given,
                 " of k_hr, v_hr, hr_slots and hr_count are given, expected all or none");
  if (given != 4) return;
  const at::ScalarType dtype[] = {a.q.scalar_type()};
  const int64_t B = a.q.size(0), Hkv = a.k.size(1), d = a.q.size(3);
  reasons.unless(a.hr_from || a.hr_rows, "k_hr is given without hr_from or hr_rows, which say which rows see it");
  if (reasons.tensor("k_hr", a.k_hr, {-1, Hkv, d}, dtype, a.q.device()))
    reasons.tensor("v_hr", a.v_hr, {a.k_hr->size(0), Hkv, d}, dtype, a.q.device());
  if (!reasons.tensor("hr_slots", a.hr_slots, {B, -1}, kInt, a.q.device())) return;
  if (!reasons.tensor("hr_count", a.hr_count, {B}, kInt, a.q.device())) return;
  reasons.values_within("hr_count", *a.hr_count, 0, selected(a));
  if (reasons.ok()) check_slots(reasons, a);
}

void check_hr_rows(Reasons& reasons, const AttentionArguments& a) {
  const int64_t B = a.q.size(0), N = a.q.size(2);
  reasons.unless(!(a.hr_from && a.hr_rows), "hr_from and hr_rows are both given, expected one of them");
  if (reasons.tensor("hr_from", a.hr_from, {B}, kInt, a.q.device())) reasons.values_within("hr_from", *a.hr_from, 0, N);
  if (reasons.tensor("hr_rows", a.hr_rows, {B, -1}, kInt, a.q.device())) {
    reasons.values_within("hr_rows", *a.hr_rows, -1, N - 1);
    if (reasons.ok()) reasons.distinct_in_rows("hr_rows", *a.hr_rows, N);
  }
  reasons.unless(!a.hr_row_bits || (a.hr_rows && has_pool(a)), "hr_row_bits is given without hr_rows and an HR pool");
  if (reasons.ok())
    reasons.tensor("hr_row_bits", a.hr_row_bits, {B, rows(a), words_for_bits(selected(a))}, kInt, a.q.device());
  if (reasons.tensor("alpha", a.alpha, {B}, kFloat, a.q.device())) reasons.fractions("alpha", *a.alpha);
}

}  // namespace

void make_small_tensors_dense(AttentionArguments& a) {
  a.kv_start = a.kv_start.contiguous();
  a.kv_len = a.kv_len.contiguous();
  for (OptionalTensor* t : {&a.key_mask, &a.bidirectional_ranges, &a.hr_slots, &a.hr_count, &a.hr_from, &a.hr_rows,
                            &a.hr_row_bits, &a.alpha})
    if (*t) *t = (*t)->contiguous();
}

AttentionInputs checked_inputs(Reasons& reasons, const AttentionArguments& a, double scale) {
  check_queries_and_keys(reasons, a);
  check_visible_keys(reasons, a);
  check_ranges_and_caps(reasons, a);
  check_pool(reasons, a);
  check_hr_rows(reasons, a);
  reasons.raise_if_any();

  AttentionInputs in = attention_layout(a.q, a.k, a.v, a.k_hr, a.v_hr, scale);
  in.kv_start = ints(a.kv_start);
  in.kv_len = ints(a.kv_len);
  in.key_mask = ints(a.key_mask);
  // Positions fit into 32 bits: no query reaches back further than that.
  in.window = a.window < std::min<int64_t>(in.keys, INT32_MAX) ? a.window : 0;
  in.ranges = a.bidirectional_ranges ? a.bidirectional_ranges->size(1) : 0;
  in.bidirectional_ranges = in.ranges ? ints(a.bidirectional_ranges) : nullptr;
  in.softcap = a.softcap;
  in.selected = selected(a);
  if (in.pool == 0 || in.selected == 0) in.k_hr = in.v_hr = nullptr;
  in.hr_slots = ints(a.hr_slots);
  in.hr_count = ints(a.hr_count);
  in.rows = rows(a);
  in.hr_from = ints(a.hr_from);
  in.hr_rows = ints(a.hr_rows);
  in.hr_row_bits = ints(a.hr_row_bits);
  in.alpha = a.alpha ? a.alpha->const_data_ptr<float>() : nullptr;
  return in;
}

AttentionInputs attention_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const OptionalTensor& k_hr, const OptionalTensor& v_hr, double scale) {
  AttentionInputs in{};
  in.dtype = dtype_of(q);
  in.batch = q.size(0);
  in.heads = q.size(1);
  in.kv_heads = k.size(1);
  in.queries = q.size(2);
  in.keys = k.size(2);
  in.head_dim = q.size(3);
  in.scale = scale;
  in.q = q.const_data_ptr();
  in.k = k.const_data_ptr();
  in.v = v.const_data_ptr();
  in.q_strides = strides_of(q);
  in.k_strides = strides_of(k);
  in.v_strides = strides_of(v);
  if (k_hr && v_hr) {
    in.pool = k_hr->size(0);
    in.k_hr = k_hr->const_data_ptr();
    in.v_hr = v_hr->const_data_ptr();
    in.k_hr_strides = row_strides_of(*k_hr);
    in.v_hr_strides = row_strides_of(*v_hr);
  }
  return in;
}

}  // namespace flexattn::torch_binding
