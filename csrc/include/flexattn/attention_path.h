// Which kernel runs a call of hierarchical_attention, and why not a faster one. Plain C++, so that every build can
// tell.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flexattn/hierarchical_attention.h"

namespace flexattn {

enum class AttentionPath {
  kGeneric,  // any head size and dtype
  kDecode,   // few query rows: the keys are split over the GPU
  kVolta,    // tensor cores: m8n8k4
  kAmpere,   // tensor cores: m16n8k16
};

constexpr int64_t kMaxDecodeRows = 16;

struct PathChoice {
  AttentionPath path;
  std::vector<std::string> reasons;  // why not a faster path than the generic one
};

// capability: 10 * major + minor of the GPU.
inline PathChoice choose_attention_path(const AttentionInputs& in, int capability) {
  PathChoice choice{AttentionPath::kGeneric, {}};
  const auto against = [&](bool condition, const std::string& reason) {
    if (condition) choice.reasons.push_back(reason);
  };
  const bool decode = in.queries <= kMaxDecodeRows;
  const bool half = in.dtype == DType::kFloat16, bfloat = in.dtype == DType::kBFloat16;
  const std::string here = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  const int64_t d = in.head_dim, element = in.dtype == DType::kFloat64 ? 8 : in.dtype == DType::kFloat32 ? 4 : 2;
  if (decode) {
    against(in.dtype == DType::kFloat64, "the dtype is float64");
    against(d != 64 && d != 80 && d != 96 && d != 128,
            "head_dim is " + std::to_string(d) + ", the decode kernel takes 64, 80, 96 or 128");
  } else {
    against(!half && !bfloat, "the dtype is neither float16 nor bfloat16, which tensor cores take");
    against(bfloat && capability < 80, "bfloat16 needs compute capability 8.0, this is " + here);
    against(half && capability < 70, "tensor cores need compute capability 7.0, this is " + here);
    against(d > 128 || d % 8, "head_dim is " + std::to_string(d) + ", tensor cores take multiples of 8 up to 128");
    against(!(in.scale > 0), "the scale is not positive");
  }
  against(in.queries >= int64_t{1} << 31 || in.keys >= int64_t{1} << 31 || in.selected >= int64_t{1} << 31,
          "a size is 2^31 or larger");

  // 16-byte loads need aligned data and aligned strides; the last dimension is dense.
  struct Layout {
    const char* name;
    const void* data;
    const Strides& strides;
    bool batched;
  };
  const Layout layouts[] = {{"q", decode ? nullptr : in.q, in.q_strides, true},
                            {"k", in.k, in.k_strides, true},
                            {"v", in.v, in.v_strides, true},
                            {"k_hr", in.k_hr, in.k_hr_strides, false},
                            {"v_hr", in.v_hr, in.v_hr_strides, false}};
  for (const Layout& x : layouts) {
    const int64_t steps =
        x.strides.row | x.strides.head | (x.batched && in.batch > 1 ? x.strides.batch : 0);  // low bits of all
    against(x.data && (reinterpret_cast<uintptr_t>(x.data) % 16 || steps * element % 16),
            std::string(x.name) + " is not aligned to 16 bytes in every row");
  }
  if (choice.reasons.empty())
    choice.path = decode ? AttentionPath::kDecode : capability >= 80 ? AttentionPath::kAmpere : AttentionPath::kVolta;
  return choice;
}

}  // namespace flexattn
