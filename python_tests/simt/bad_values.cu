// Calls of hierarchical_attention whose index tensors hold a value that they must not. The host sees the values of a
// tensor on the CPU and refuses them; here the kernels have to, as they must on a GPU.

#include <stdexcept>
#include <string>
#include <vector>

#include "flexattn/hierarchical_attention.h"
#include "launch.cuh"

namespace flexattn::cuda {
namespace {

constexpr int64_t kBatch = 2, kHeads = 2, kKeys = 96, kDim = 64, kPool = 10, kSelected = 6, kRows = 3, kImages = 2,
                  kMapSize = 4, kRanges = 2;

// A sound call, all zeros; in float16 unless the pass says otherwise.
struct Call {
  const int64_t queries;
  const bool listed;
  std::vector<int32_t> kv_start{0, 3}, kv_len{kKeys - 10, kKeys};
  std::vector<int32_t> hr_slots{0, 1, 2, 3, 4, 5, 9, 8, 7, 6, 5, 4}, hr_count{kSelected, kSelected};
  std::vector<int32_t> hr_from, hr_rows;
  std::vector<int32_t> bidirectional_ranges{4, 12, 20, 24, 0, 0, kKeys - 8, kKeys};
  std::vector<int32_t> map_ranges{0, kMapSize, 0, 0, 8, 8 + kMapSize, kKeys - kMapSize, kKeys};

  Call(int64_t queries, bool listed)
      : queries(queries),
        listed(listed),
        hr_from{0, static_cast<int32_t>(queries)},
        hr_rows{0, -1, -1, -1, static_cast<int32_t>(queries) - 1, -1} {}

  void set(const std::string& argument, int64_t index, int64_t value) {
    const std::pair<const char*, std::vector<int32_t>&> arguments[] = {
        {"kv_start", kv_start},     {"kv_len", kv_len},
        {"hr_slots", hr_slots},     {"hr_count", hr_count},
        {"hr_from", hr_from},       {"hr_rows", hr_rows},
        {"map_ranges", map_ranges}, {"bidirectional_ranges", bidirectional_ranges}};
    for (const auto& [name, values] : arguments)
      if (argument == name) {
        values.at(index) = static_cast<int32_t>(value);
        return;
      }
    throw std::runtime_error("no argument " + argument);
  }

  void run(const std::string& pass) const {
    const bool single = pass == "forward in float32";
    const std::vector<float> q(kBatch * kHeads * queries * kDim), k(kBatch * kKeys * kDim), pool(kPool * kDim);
    AttentionInputs in{};
    in.dtype = single ? DType::kFloat32 : DType::kFloat16;
    in.batch = kBatch, in.heads = kHeads, in.kv_heads = 1;
    in.queries = queries, in.keys = kKeys, in.head_dim = kDim, in.scale = 1;
    in.q = q.data(), in.k = in.v = k.data(), in.k_hr = in.v_hr = pool.data();
    in.q_strides = {kHeads * queries * kDim, queries * kDim, kDim};
    in.k_strides = in.v_strides = {kKeys * kDim, kKeys * kDim, kDim};
    in.k_hr_strides = in.v_hr_strides = {0, kDim, kDim};
    in.kv_start = kv_start.data(), in.kv_len = kv_len.data();
    in.ranges = kRanges, in.bidirectional_ranges = bidirectional_ranges.data();
    in.pool = kPool, in.selected = kSelected, in.hr_slots = hr_slots.data(), in.hr_count = hr_count.data();
    in.rows = listed ? kRows : 1;
    (listed ? in.hr_rows : in.hr_from) = (listed ? hr_rows : hr_from).data();
    if (pass == "forward" || single) return run_forward(in);
    run_backward(in, pass == "gradients of keys");
  }

  void run_forward(const AttentionInputs& in) const {
    std::vector<float> out(kBatch * kHeads * queries * kDim);
    std::vector<float> lse(kBatch * kHeads * queries), lse_seq(lse), map(kBatch * in.rows * kImages * kMapSize);
    AttentionForwardParams p{in};
    p.images = kImages, p.map_size = kMapSize, p.map_ranges = map_ranges.data();
    p.out = out.data(), p.lse = lse.data(), p.lse_seq = lse_seq.data(), p.map = map.data();
    std::vector<float> workspace(hierarchical_attention_workspace(p, nullptr) / sizeof(float));
    p.workspace = workspace.data();
    hierarchical_attention_forward(p, nullptr);
  }

  // of_keys: no gradient of the queries, and with the output, so that the kernels of the keys come first.
  void run_backward(const AttentionInputs& in, bool of_keys) const {
    const std::vector<uint16_t> grad_out(kBatch * queries * kHeads * kDim);
    const std::vector<float> lse(kBatch * kHeads * queries);
    std::vector<uint16_t> grad_q(grad_out), grad_k(kBatch * kKeys * kDim), grad_v(grad_k), grad_k_hr(kPool * kDim),
        grad_v_hr(grad_k_hr);
    std::vector<float> row_states(4 * lse.size());
    std::vector<int32_t> slot_to_key(kBatch * kPool);
    AttentionBackwardParams p{in};
    p.grad_out = grad_out.data(), p.grad_out_strides = {queries * kHeads * kDim, kDim, kHeads * kDim};
    p.lse = p.lse_seq = lse.data();
    if (of_keys)
      p.out = grad_out.data();
    else
      p.grad_q = grad_q.data();
    p.grad_k = grad_k.data(), p.grad_v = grad_v.data();
    p.grad_k_hr = grad_k_hr.data(), p.grad_v_hr = grad_v_hr.data();
    p.row_states = row_states.data(), p.slot_to_key = slot_to_key.data();
    hierarchical_attention_backward(p, nullptr);
  }
};

}  // namespace

// Run a call with one value replaced; "" replaces none. listed: hr_rows says which rows see HR keys, not hr_from.
void run_bad_value(const std::string& argument, int64_t index, int64_t value, int64_t queries, bool listed,
                   const std::string& pass) {
  Call call(queries, listed);
  if (!argument.empty()) call.set(argument, index, value);
  call.run(pass);
}

}  // namespace flexattn::cuda
