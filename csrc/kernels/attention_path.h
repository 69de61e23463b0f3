// Which kernel takes a call of hierarchical_attention, and why not a faster one. Plain C++: every build can tell.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flexattn/hierarchical_attention.h"

namespace flexattn {

enum class AttentionPath { kGeneric, kVolta, kAmpere };  // the latter two: tensor cores, m8n8k4 and m16n8k16

struct PathChoice {
  AttentionPath path;
  std::vector<std::string> reasons;  // against the tensor cores
};

// capability: 10 * major + minor of the GPU.
inline PathChoice choose_attention_path(const AttentionInputs& in, int capability) {
  PathChoice choice{AttentionPath::kGeneric, {}};
  auto against = [&](bool condition, const std::string& reason) {
    if (condition) choice.reasons.push_back(reason);
  };
  const bool half = in.dtype == DType::kFloat16, bfloat = in.dtype == DType::kBFloat16;
  against(!half && !bfloat, "the dtype is neither float16 nor bfloat16");
  against(bfloat && capability < 80, "bfloat16 takes compute capability 8.0, this is " + std::to_string(capability / 10) + "." +
                                         std::to_string(capability % 10));
  against(half && capability < 70, "tensor cores take compute capability 7.0, this is " + std::to_string(capability / 10) + "." +
                                       std::to_string(capability % 10));
  against(in.head_dim > 128 || in.head_dim % 8, "head_dim is " + std::to_string(in.head_dim) + ", it must be a multiple of 8 up to 128");
  against(!(in.scale > 0), "the scale is not positive");
  against(in.queries >= int64_t{1} << 31 || in.keys >= int64_t{1} << 31 || in.selected >= int64_t{1} << 31, "a size passes 2^31");

  // 16-byte loads: data and every stride but the last.
  struct Layout {
    const char* name;
    const void* data;
    const Strides& strides;
    bool batched;
  };
  const Layout layouts[] = {{"q", in.q, in.q_strides, true}, {"k", in.k, in.k_strides, true}, {"v", in.v, in.v_strides, true},
                            {"k_hr", in.k_hr, in.k_hr_strides, false}, {"v_hr", in.v_hr, in.v_hr_strides, false}};
  for (const Layout& x : layouts) {
    const bool strides = x.strides.row % 8 == 0 && x.strides.head % 8 == 0 && (!x.batched || in.batch == 1 || x.strides.batch % 8 == 0);
    against(x.data && (reinterpret_cast<uintptr_t>(x.data) % 16 || !strides), std::string(x.name) + " is not aligned to 16 bytes in every row");
  }
  if (choice.reasons.empty()) choice.path = capability >= 80 ? AttentionPath::kAmpere : AttentionPath::kVolta;
  return choice;
}

}  // namespace flexattn
