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
  kFma,      // many query rows without tensor cores
  kVolta,    // tensor cores: m8n8k4
  kAmpere,   // tensor cores: m16n8k16
};

constexpr int64_t kMaxDecodeRows = 16;

struct PathChoice {
  AttentionPath path;
  std::vector<std::string> reasons;  // why not a faster path
};

// Collects the reasons against a path.
class PathReasons {
 public:
  std::vector<std::string> list;

  void against(bool condition, const std::string& reason) {
    if (condition) list.push_back(reason);
  }

  static std::string version(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }

  // What tensor cores need, besides what all tiles do.
  void check_tensor_cores(const AttentionInputs& in, int capability) {
    const bool half = in.dtype == DType::kFloat16, bfloat = in.dtype == DType::kBFloat16;
    const std::string here = version(capability);
    const int64_t d = in.head_dim;
    against(!half && !bfloat, "the dtype is neither float16 nor bfloat16, which tensor cores take");
    against(bfloat && capability < 80, "bfloat16 needs compute capability 8.0, this is " + here);
    against(half && capability < 70, "tensor cores need compute capability 7.0, this is " + here);
    against(d > 128 || d % 8, "head_dim is " + std::to_string(d) + ", tensor cores take multiples of 8 up to 128");
  }

  // What tiles without tensor cores need, likewise.
  void check_fma(const AttentionInputs& in, int capability) {
    const int64_t d = in.head_dim;
    against(in.dtype == DType::kFloat64, "the dtype is float64");
    against(capability < 70, "tiles need compute capability 7.0, this is " + version(capability));
    against(d > 256 || d % 8,
            "head_dim is " + std::to_string(d) + ", tiles without tensor cores take multiples of 8 up to 256");
  }

  // What all tiles need.
  void check_tiles(const AttentionInputs& in) {
    against(!(in.scale > 0), "the scale is not positive");
    check_sizes(in);
    check_alignment("q", in.q, in.q_strides, in.batch, in.dtype);
    check_alignment_of_keys(in);
    check_distance("q", in.q_strides, in.dtype);
    check_distance("k", in.k_strides, in.dtype);
    check_distance("v", in.v_strides, in.dtype);
    check_distance("k_hr", in.k_hr_strides, in.dtype);
    check_distance("v_hr", in.v_hr_strides, in.dtype);
  }

  void check_sizes(const AttentionInputs& in) {
    constexpr int64_t kLimit = int64_t{1} << 31;
    against(in.queries >= kLimit || in.keys >= kLimit || in.selected >= kLimit, "a size is 2^31 or larger");
  }

  // 16-byte loads need aligned data and aligned strides; the last dimension is dense. samples: 1 if there is no batch.
  void check_alignment(const char* name, const void* data, const Strides& strides, int64_t samples, DType dtype) {
    const int64_t steps = strides.row | strides.head | (samples > 1 ? strides.batch : 0);  // low bits of all
    against(data && (reinterpret_cast<uintptr_t>(data) % 16 || steps * bytes_of(dtype) % 16),
            std::string(name) + " is not aligned to 16 bytes in every row");
  }
  // Kernels in tiles take the distance of rows as 32 bits.
  void check_distance(const char* name, const Strides& strides, DType dtype) {
    against(strides.row * bytes_of(dtype) >= int64_t{1} << 31,
            std::string("rows of ") + name + " are 2 GiB or more apart");
  }
  void check_alignment_of_keys(const AttentionInputs& in) {
    check_alignment("k", in.k, in.k_strides, in.batch, in.dtype);
    check_alignment("v", in.v, in.v_strides, in.batch, in.dtype);
    check_alignment("k_hr", in.k_hr, in.k_hr_strides, 1, in.dtype);
    check_alignment("v_hr", in.v_hr, in.v_hr_strides, 1, in.dtype);
  }

  void add(const PathReasons& others) { list.insert(list.end(), others.list.begin(), others.list.end()); }

  PathChoice choose(AttentionPath path) const { return {list.empty() ? path : AttentionPath::kGeneric, list}; }
};

inline AttentionPath tensor_cores_of(int capability) {
  return capability >= 80 ? AttentionPath::kAmpere : AttentionPath::kVolta;
}

inline PathChoice choose_decode_path(const AttentionInputs& in) {
  PathReasons reasons;
  const int64_t d = in.head_dim;
  reasons.against(in.dtype == DType::kFloat64, "the dtype is float64");
  reasons.against(d != 64 && d != 80 && d != 96 && d != 128,
                  "head_dim is " + std::to_string(d) + ", the decode kernel takes 64, 80, 96 or 128");
  reasons.check_sizes(in);
  reasons.check_alignment_of_keys(in);
  return reasons.choose(AttentionPath::kDecode);
}

// Of the kernels in tiles the fastest that nothing speaks against. of_tiles: the reasons against all of them.
inline PathChoice choose_tiles(const AttentionInputs& in, int capability, const PathReasons& of_tiles) {
  PathReasons tensor_cores, fma;
  tensor_cores.check_tensor_cores(in, capability);
  fma.check_fma(in, capability);
  if (of_tiles.list.empty() && !tensor_cores.list.empty() && fma.list.empty())
    return {AttentionPath::kFma, tensor_cores.list};
  if (!tensor_cores.list.empty()) tensor_cores.add(fma);
  tensor_cores.add(of_tiles);
  return tensor_cores.choose(tensor_cores_of(capability));
}

// capability: 10 * major + minor of the GPU.
inline PathChoice choose_attention_path(const AttentionInputs& in, int capability) {
  if (in.queries <= kMaxDecodeRows) return choose_decode_path(in);
  PathReasons tiles;
  tiles.check_tiles(in);
  return choose_tiles(in, capability, tiles);
}

// The same for the backward pass, which has no path of its own for few queries.
inline PathChoice choose_backward_path(const AttentionBackwardParams& p, int capability) {
  PathReasons tiles;
  tiles.against(p.in.softcap > 0, "the logits have a softcap, whose derivative only the generic kernels compute");
  tiles.check_tiles(p.in);
  tiles.check_alignment("grad_out", p.grad_out, p.grad_out_strides, p.in.batch, p.in.dtype);
  tiles.check_distance("grad_out", p.grad_out_strides, p.in.dtype);
  tiles.check_alignment("out", p.out, {}, p.in.batch, p.in.dtype);
  return choose_tiles(p.in, capability, tiles);
}

}  // namespace flexattn
