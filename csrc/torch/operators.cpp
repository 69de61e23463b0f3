// The operators on real tensors: checks, allocation, and the call of a launch function.

#include "operators.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "device.h"
#include "flexattn/assign_slots.h"
#include "flexattn/gather_tokens.h"
#include "flexattn/hierarchical_attention.h"
#include "flexattn/select_tokens.h"
#include "flexattn/write_hr_kv.h"
#include "nvtx.h"

namespace flexattn::torch_binding {
namespace {

const at::ScalarType kInt[] = {at::kInt};
const at::ScalarType kMaps[] = {at::kFloat, at::kDouble};
const at::ScalarType kFloating[] = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};

const int32_t* ints(const at::Tensor& t) { return t.const_data_ptr<int32_t>(); }
const int32_t* ints(const OptionalTensor& t) { return t ? t->const_data_ptr<int32_t>() : nullptr; }

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

at::ScalarType statistics(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

int64_t exact_root(int64_t square) {
  int64_t side = static_cast<int64_t>(std::sqrt(static_cast<double>(square)));
  while (side * side > square) --side;
  while ((side + 1) * (side + 1) <= square) ++side;
  return side;
}

// Small index tensors are read only where that needs no wait for a device.
bool readable(const at::Tensor& t) { return t.is_cpu() && t.numel() > 0; }

void check_range(Reasons& reasons, const char* name, const at::Tensor& t, int64_t low, int64_t high) {
  if (!readable(t)) return;
  const at::Tensor dense = t.contiguous();
  const auto [least, most] = std::minmax_element(ints(dense), ints(dense) + dense.numel());
  reasons.unless(*least >= low && *most <= high, name, " has values from ", *least, " to ", *most,
                 ", they must lie in ", low, " to ", high);
}

// A row of an index may hold -1 several times, but nothing else twice.
void check_distinct(Reasons& reasons, const char* name, const at::Tensor& t, int64_t values) {
  if (!readable(t)) return;
  std::vector<bool> seen;
  const at::Tensor dense = t.contiguous();
  for (int64_t b = 0; b < dense.size(0); ++b) {
    seen.assign(values, false);
    for (int64_t i = 0; i < dense.size(1); ++i) {
      const int32_t value = ints(dense)[b * dense.size(1) + i];
      if (value < 0) continue;
      reasons.unless(!seen[value], name, " holds ", value, " twice in row ", b);
      if (seen[value]) return;
      seen[value] = true;
    }
  }
}

Strides strides_of(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
// [row, head, channel]
Strides pool_strides(const at::Tensor& t) { return {0, t.stride(1), t.stride(0)}; }
Strides pool_strides(const OptionalTensor& t) { return t ? pool_strides(*t) : Strides{}; }

// Checks everything that both passes of attention read, and describes it to the kernels.
AttentionInputs attention_inputs(Reasons& reasons, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionArguments& a, double scale) {
  const at::Device device = q.device();
  reasons.tensor("q", q, {-1, -1, -1, -1}, kFloating, device);
  reasons.raise_if_any();
  const at::ScalarType dtype[] = {q.scalar_type()};
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), d = q.size(3);
  reasons.tensor("k", k, {B, -1, -1, d}, dtype, device);
  reasons.raise_if_any();
  const int64_t Hkv = k.size(1), Nk = k.size(2);
  reasons.unless(Hkv > 0 && H % Hkv == 0, "q has ", H, " heads, which must be a multiple of k's ", Hkv);
  reasons.unless(N > 0 && d > 0, "q has shape ", q.sizes(), ", queries and head_dim must be at least 1");
  reasons.unless(N <= Nk, "q has ", N, " queries, more than the ", Nk, " keys");
  reasons.tensor("v", v, {B, Hkv, Nk, d}, dtype, device);
  const bool starts = reasons.tensor("kv_start", a.kv_start, {B}, kInt, device);
  const bool lengths = reasons.tensor("kv_len", a.kv_len, {B}, kInt, device);
  if (starts) check_range(reasons, "kv_start", a.kv_start, 0, Nk);
  if (lengths) check_range(reasons, "kv_len", a.kv_len, N, Nk);
  reasons.tensor("key_mask", a.key_mask, {B, words_for_bits(Nk)}, kInt, device);

  const int pool_parts = a.k_hr.has_value() + a.v_hr.has_value() + a.hr_slots.has_value() + a.hr_count.has_value();
  reasons.unless(pool_parts == 0 || pool_parts == 4, "k_hr, v_hr, hr_slots and hr_count must be given together; ",
                 pool_parts, " of the four are");
  reasons.unless(!(a.hr_from && a.hr_rows), "hr_from and hr_rows exclude each other");
  const int64_t R = a.hr_rows ? (a.hr_rows->dim() == 2 ? a.hr_rows->size(1) : -1) : 1;
  int64_t P = 0, M = 0;
  if (pool_parts == 4) {
    reasons.unless(a.hr_from || a.hr_rows, "k_hr needs hr_from or hr_rows: which rows see it");
    if (reasons.tensor("k_hr", a.k_hr, {-1, Hkv, d}, dtype, device)) {
      P = a.k_hr->size(0);
      reasons.tensor("v_hr", a.v_hr, {P, Hkv, d}, dtype, device);
    }
    if (reasons.tensor("hr_slots", a.hr_slots, {B, -1}, kInt, device)) {
      M = a.hr_slots->size(1);
      if (reasons.tensor("hr_count", a.hr_count, {B}, kInt, device)) {
        check_range(reasons, "hr_count", *a.hr_count, 0, M);
        if (readable(*a.hr_slots) && readable(*a.hr_count) && reasons.ok()) {
          for (int64_t b = 0; b < B; ++b) {
            const at::Tensor used = a.hr_slots->select(0, b).narrow(0, 0, ints(a.hr_count)[b]);
            check_range(reasons, "hr_slots", used, 0, P - 1);
            if (reasons.ok()) check_distinct(reasons, "hr_slots", used.unsqueeze(0), P);
          }
        }
      }
    }
  }
  if (reasons.tensor("hr_from", a.hr_from, {B}, kInt, device) && a.hr_from)
    check_range(reasons, "hr_from", *a.hr_from, 0, N);
  if (reasons.tensor("hr_rows", a.hr_rows, {B, -1}, kInt, device) && a.hr_rows) {
    check_range(reasons, "hr_rows", *a.hr_rows, -1, N - 1);
    if (reasons.ok()) check_distinct(reasons, "hr_rows", *a.hr_rows, N);
  }
  reasons.unless(!a.hr_row_bits || (a.hr_rows && pool_parts == 4), "hr_row_bits needs hr_rows and an HR pool");
  reasons.tensor("hr_row_bits", a.hr_row_bits, {B, R, words_for_bits(M)}, kInt, device);
  const at::ScalarType kFloat[] = {at::kFloat};
  reasons.tensor("alpha", a.alpha, {B}, kFloat, device);
  reasons.raise_if_any();

  AttentionInputs in = attention_layout(q, k, v, a.k_hr, a.v_hr, scale);
  in.kv_start = ints(a.kv_start), in.kv_len = ints(a.kv_len), in.key_mask = ints(a.key_mask);
  in.selected = M;
  if (P == 0 || M == 0) in.k_hr = in.v_hr = nullptr;
  in.hr_slots = ints(a.hr_slots), in.hr_count = ints(a.hr_count);
  in.rows = R, in.hr_from = ints(a.hr_from), in.hr_rows = ints(a.hr_rows), in.hr_row_bits = ints(a.hr_row_bits);
  in.alpha = a.alpha ? a.alpha->const_data_ptr<float>() : nullptr;
  return in;
}

// Everything but q, k, v and the pool is small and read densely.
AttentionArguments dense(const AttentionArguments& a) {
  return {a.kv_start.contiguous(),
          a.kv_len.contiguous(),
          contiguous(a.key_mask),
          a.k_hr,
          a.v_hr,
          contiguous(a.hr_slots),
          contiguous(a.hr_count),
          contiguous(a.hr_from),
          contiguous(a.hr_rows),
          contiguous(a.hr_row_bits),
          contiguous(a.alpha)};
}

}  // namespace

AttentionInputs attention_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const OptionalTensor& k_hr, const OptionalTensor& v_hr, double scale) {
  AttentionInputs in{};
  in.dtype = dtype_of(q);
  in.batch = q.size(0), in.heads = q.size(1), in.queries = q.size(2), in.head_dim = q.size(3), in.scale = scale;
  in.kv_heads = k.size(1), in.keys = k.size(2);
  in.q = q.const_data_ptr(), in.k = k.const_data_ptr(), in.v = v.const_data_ptr();
  in.q_strides = strides_of(q), in.k_strides = strides_of(k), in.v_strides = strides_of(v);
  if (k_hr && v_hr) {
    in.pool = k_hr->size(0);
    in.k_hr = k_hr->const_data_ptr(), in.v_hr = v_hr->const_data_ptr();
    in.k_hr_strides = pool_strides(k_hr), in.v_hr_strides = pool_strides(v_hr);
  }
  return in;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_tokens(const at::Tensor& map, const at::Tensor& live,
                                                                         int64_t hr_side, double scale,
                                                                         double threshold, int64_t pool_side) {
  const NvtxRange range("select_tokens");
  Reasons reasons("select_tokens");
  reasons.tensor("map", map, {-1, -1, -1, -1}, kMaps, map.device());
  reasons.raise_if_any();
  const int64_t B = map.size(0), R = map.size(1), I = map.size(2), S = exact_root(map.size(3));
  reasons.unless(S * S == map.size(3) && S > 0, "map has ", map.size(3),
                 " cells, which must be the square of the grid's side");
  reasons.tensor("live", live, {B, I, 4}, kInt, map.device());
  reasons.unless(hr_side > 0, "hr_side is ", hr_side, ", it must be at least 1");
  reasons.unless(pool_side >= 0 && pool_side <= S, "pool_side is ", pool_side, ", it must be 0 (no pooling) to ", S);
  reasons.unless(I * hr_side * hr_side < (int64_t(1) << 31), "the HR grids of ", I,
                 " images have more than 2^31 tokens");
  if (reasons.ok()) check_range(reasons, "live", live, 0, S);
  reasons.raise_if_any();

  const int64_t tokens = I * hr_side * hr_side;
  const auto i32 = map.options().dtype(at::kInt);
  at::Tensor mask = at::empty({B, R, I, hr_side * hr_side}, map.options().dtype(at::kBool));
  at::Tensor index = at::empty({B, tokens}, i32), count = at::empty({B}, i32);
  at::Tensor bits = at::empty({B, R, words_for_bits(tokens)}, i32);
  const at::Tensor dense_map = map.contiguous(), dense_live = live.contiguous();
  const SelectTokensParams params{dtype_of(map),
                                  dense_map.const_data_ptr(),
                                  ints(dense_live),
                                  B,
                                  R,
                                  I,
                                  S,
                                  hr_side,
                                  pool_side,
                                  scale,
                                  threshold,
                                  mask.mutable_data_ptr<bool>(),
                                  index.mutable_data_ptr<int32_t>(),
                                  count.mutable_data_ptr<int32_t>(),
                                  bits.mutable_data_ptr<int32_t>()};
  FLEXATTN_LAUNCH(select_tokens, params, map);
  return {mask, index, count, bits};
}

at::Tensor gather_tokens(const at::Tensor& tokens, const at::Tensor& index) {
  const NvtxRange range("gather_tokens");
  Reasons reasons("gather_tokens");
  reasons.tensor("tokens", tokens, {-1, -1, -1}, kFloating, tokens.device());
  reasons.raise_if_any();
  const int64_t B = tokens.size(0), T = tokens.size(1), D = tokens.size(2);
  if (reasons.tensor("index", index, {B, -1}, kInt, tokens.device())) {
    check_range(reasons, "index", index, -1, T - 1);
    if (reasons.ok()) check_distinct(reasons, "index", index, T);
  }
  reasons.raise_if_any();
  const int64_t M = index.size(1);
  at::Tensor rows = at::empty({B, M, D}, tokens.options());
  if (rows.numel() == 0) return rows;
  const at::Tensor dense_index = index.contiguous();
  const GatherTokensParams params{tokens.element_size(),
                                  B,
                                  T,
                                  M,
                                  D,
                                  ints(dense_index),
                                  tokens.const_data_ptr(),
                                  tokens.stride(0),
                                  tokens.stride(1),
                                  rows.mutable_data_ptr()};
  FLEXATTN_LAUNCH(gather_tokens, params, tokens);
  return rows;
}

at::Tensor gather_tokens_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_tokens) {
  const NvtxRange range("gather_tokens_backward");
  Reasons reasons("gather_tokens_backward");
  reasons.tensor("grad", grad, {-1, -1, -1}, kFloating, grad.device());
  reasons.raise_if_any();
  const int64_t B = grad.size(0), M = grad.size(1), D = grad.size(2);
  if (reasons.tensor("index", index, {B, M}, kInt, grad.device()))
    check_range(reasons, "index", index, -1, num_tokens - 1);
  reasons.raise_if_any();
  at::Tensor result = at::empty({B, num_tokens, D}, grad.options());
  if (result.numel() == 0) return result;
  const at::Tensor dense_index = index.contiguous();
  const GatherTokensParams params{grad.element_size(),
                                  B,
                                  num_tokens,
                                  M,
                                  D,
                                  ints(dense_index),
                                  grad.const_data_ptr(),
                                  grad.stride(0),
                                  grad.stride(1),
                                  result.mutable_data_ptr()};
  FLEXATTN_LAUNCH(scatter_tokens, params, grad);
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> assign_slots(
    const at::Tensor& index, const at::Tensor& count, at::Tensor& table, at::Tensor& next_free, int64_t capacity) {
  Reasons reasons("assign_slots");
  const at::Device device = index.device();
  reasons.tensor("index", index, {-1, -1}, kInt, device);
  reasons.raise_if_any();
  const int64_t B = index.size(0), M = index.size(1);
  if (reasons.tensor("count", count, {B}, kInt, device)) check_range(reasons, "count", count, 0, M);
  if (reasons.tensor("table", table, {-1, -1}, kInt, device)) {
    const int64_t G = table.size(0), T = table.size(1);
    reasons.unless(G == B || (G > 0 && B % G == 0), "table has ", G, " rows, which must divide the ", B, " of index");
    reasons.unless(G * T <= std::numeric_limits<int32_t>::max(), "table has ", G * T, " places, 2^31 - 1 are possible");
    check_range(reasons, "table", table, -1, capacity - 1);
    check_range(reasons, "index", index, -1, T - 1);
    if (reasons.ok()) check_distinct(reasons, "index", index, T);
  }
  if (reasons.tensor("next_free", next_free, {1}, kInt, device))
    check_range(reasons, "next_free", next_free, 0, capacity);
  reasons.unless(capacity >= 0 && capacity <= std::numeric_limits<int32_t>::max(), "capacity is ", capacity,
                 ", it must lie in 0 to 2^31 - 1");
  reasons.raise_if_any();
  const auto i32 = index.options();
  at::Tensor slots = at::empty({B, M}, i32), new_tokens = at::empty({B * M}, i32), new_slots = at::empty({B * M}, i32);
  at::Tensor new_count = at::empty({1}, i32), overflow = at::empty({1}, i32);
  const at::Tensor dense_index = index.contiguous(), dense_count = count.contiguous();
  const AssignSlotsParams params{B,
                                 table.size(0),
                                 table.size(1),
                                 M,
                                 capacity,
                                 ints(dense_index),
                                 ints(dense_count),
                                 table.mutable_data_ptr<int32_t>(),
                                 table.stride(0),
                                 next_free.mutable_data_ptr<int32_t>(),
                                 slots.mutable_data_ptr<int32_t>(),
                                 new_tokens.mutable_data_ptr<int32_t>(),
                                 new_slots.mutable_data_ptr<int32_t>(),
                                 new_count.mutable_data_ptr<int32_t>(),
                                 overflow.mutable_data_ptr<int32_t>()};
  FLEXATTN_LAUNCH(assign_slots, params, index);
  return {slots, new_tokens, new_slots, new_count, overflow};
}

void write_hr_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin,
                 const at::Tensor& slots, at::Tensor& k_pool, at::Tensor& v_pool) {
  Reasons reasons("write_hr_kv");
  const at::Device device = k.device();
  reasons.tensor("k", k, {-1, -1, -1}, kFloating, device);
  reasons.raise_if_any();
  const at::ScalarType dtype[] = {k.scalar_type()}, tables[] = {k.scalar_type(), at::kFloat};
  const int64_t M = k.size(0), heads = k.size(1), d = k.size(2);
  reasons.unless(d % 2 == 0, "k has head_dim ", d, ", it must be even");
  reasons.tensor("v", v, {M, heads, d}, dtype, device);
  if (reasons.tensor("cos", cos, {M, d}, tables, device)) {
    const at::ScalarType same[] = {cos.scalar_type()};
    reasons.tensor("sin", sin, {M, d}, same, device);
  }
  const bool has_slots = reasons.tensor("slots", slots, {M}, kInt, device);
  if (reasons.tensor("k_pool", k_pool, {-1, heads, d}, dtype, device)) {
    const int64_t P = k_pool.size(0);
    reasons.tensor("v_pool", v_pool, {P, heads, d}, dtype, device);
    if (has_slots) check_range(reasons, "slots", slots, -1, P - 1);
    if (reasons.ok()) check_distinct(reasons, "slots", slots.unsqueeze(0), P);
  }
  reasons.raise_if_any();
  if (k.numel() == 0) return;
  const at::Tensor dense_slots = slots.contiguous();
  const WriteHrKvParams params{dtype_of(k),
                               dtype_of(cos),
                               M,
                               heads,
                               d,
                               k_pool.size(0),
                               ints(dense_slots),
                               k.const_data_ptr(),
                               v.const_data_ptr(),
                               k_pool.mutable_data_ptr(),
                               v_pool.mutable_data_ptr(),
                               pool_strides(k),
                               pool_strides(v),
                               pool_strides(k_pool),
                               pool_strides(v_pool),
                               cos.const_data_ptr(),
                               sin.const_data_ptr(),
                               cos.stride(0),
                               sin.stride(0)};
  FLEXATTN_LAUNCH(write_hr_kv, params, k);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hierarchical_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionArguments& given,
    const OptionalTensor& map_ranges, int64_t map_size, bool map_over_all, double scale) {
  const NvtxRange range("hierarchical_attention");
  Reasons reasons("hierarchical_attention");
  const AttentionArguments a = dense(given);
  AttentionForwardParams params{};
  params.in = attention_inputs(reasons, q, k, v, a, scale);
  const int64_t B = params.in.batch, H = params.in.heads, N = params.in.queries,
                I = map_ranges ? map_ranges->size(1) : 0;
  const OptionalTensor ranges = contiguous(map_ranges);
  if (ranges && reasons.tensor("map_ranges", ranges, {B, I, 2}, kInt, q.device()) && readable(*ranges)) {
    check_range(reasons, "map_ranges", *ranges, 0, params.in.keys);
    for (int64_t i = 0; i < B * I; ++i) {
      const int64_t length = ints(ranges)[2 * i + 1] - ints(ranges)[2 * i];
      reasons.unless(length == 0 || length == map_size, "map_ranges has a range of ", length,
                     " keys, it must be 0 or map_size = ", map_size);
    }
  }
  reasons.unless(map_size >= 0, "map_size is ", map_size, ", it must not be negative");
  reasons.raise_if_any();

  const auto stats = q.options().dtype(statistics(q.scalar_type()));
  at::Tensor out = at::empty({B, N, H, params.in.head_dim}, q.options());
  at::Tensor lse = at::empty({B, H, N}, stats), lse_seq = at::empty({B, H, N}, stats);
  at::Tensor map = at::empty({B, params.in.rows, I, map_size}, stats);
  params.images = map.numel() ? I : 0;
  params.map_size = map_size;
  params.map_ranges = ints(ranges);
  params.map_over_all = map_over_all;
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  params.lse_seq = lse_seq.mutable_data_ptr();
  params.map = map.mutable_data_ptr();
  const at::Tensor workspace =
      at::empty({FLEXATTN_LAUNCH(hierarchical_attention_workspace, params, q)}, q.options().dtype(at::kByte));
  params.workspace = workspace.numel() ? workspace.mutable_data_ptr() : nullptr;
  if (out.numel()) FLEXATTN_LAUNCH(hierarchical_attention_forward, params, q);
  return {out, lse, lse_seq, map};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> hierarchical_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const AttentionArguments& given, const at::Tensor& lse, const at::Tensor& lse_seq, double scale) {
  const NvtxRange range("hierarchical_attention_backward");
  Reasons reasons("hierarchical_attention_backward");
  const AttentionArguments a = dense(given);
  AttentionBackwardParams params{};
  params.in = attention_inputs(reasons, q, k, v, a, scale);
  const AttentionInputs& in = params.in;
  const at::ScalarType dtype[] = {q.scalar_type()}, stats[] = {statistics(q.scalar_type())};
  reasons.tensor("grad_out", grad_out, {in.batch, in.queries, in.heads, in.head_dim}, dtype, q.device());
  reasons.tensor("lse", lse, {in.batch, in.heads, in.queries}, stats, q.device());
  reasons.tensor("lse_seq", lse_seq, {in.batch, in.heads, in.queries}, stats, q.device());
  reasons.raise_if_any();

  const at::Tensor dense_lse = lse.contiguous(), dense_lse_seq = lse_seq.contiguous();
  at::Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()),
             grad_v = at::empty(v.sizes(), v.options());
  const std::vector<int64_t> pool_sizes = a.k_hr ? a.k_hr->sizes().vec() : std::vector<int64_t>{0};
  const bool pool = in.k_hr != nullptr;
  at::Tensor grad_k_hr = pool ? at::empty(pool_sizes, q.options()) : at::zeros(pool_sizes, q.options());
  at::Tensor grad_v_hr = pool ? at::empty(pool_sizes, q.options()) : at::zeros(pool_sizes, q.options());
  at::Tensor delta = at::empty({in.batch, in.heads, in.queries, 2}, lse.options());
  at::Tensor slot_to_key = at::empty({pool ? in.batch : 0, in.pool}, q.options().dtype(at::kInt));
  params.grad_out = grad_out.const_data_ptr();
  params.grad_out_strides = {grad_out.stride(0), grad_out.stride(2), grad_out.stride(1)};
  params.lse = dense_lse.const_data_ptr();
  params.lse_seq = dense_lse_seq.const_data_ptr();
  params.grad_q = grad_q.mutable_data_ptr();
  params.grad_k = grad_k.mutable_data_ptr();
  params.grad_v = grad_v.mutable_data_ptr();
  params.grad_k_hr = pool ? grad_k_hr.mutable_data_ptr() : nullptr;
  params.grad_v_hr = pool ? grad_v_hr.mutable_data_ptr() : nullptr;
  params.delta = delta.mutable_data_ptr();
  params.slot_to_key = pool ? slot_to_key.mutable_data_ptr<int32_t>() : nullptr;
  if (grad_q.numel()) FLEXATTN_LAUNCH(hierarchical_attention_backward, params, q);
  return {grad_q, grad_k, grad_v, grad_k_hr, grad_v_hr};
}

}  // namespace flexattn::torch_binding
