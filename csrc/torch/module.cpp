// flexattn_cuda._C: everything that is not an operator. Importing it registers the operators.
// setup.py defines the FLEXATTN_ facts.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "architectures.h"
#include "attention_arguments.h"
#include "flexattn/attention_path.h"
#include "flexattn/block_order.h"
#include "flexattn/decode_splits.h"
#include "nvtx.h"

// flexattn_cuda/native.py reads this from the bytes of a module that another torch cannot load.
extern "C" __attribute__((used)) const char flexattn_built_with_torch[] =
    "flexattn_cuda built with torch " FLEXATTN_TORCH;

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict facts;
  facts["version"] = FLEXATTN_VERSION;
  facts["torch"] = FLEXATTN_TORCH;
  facts["compiler"] = compiler();
  facts["cuda_toolkit"] = FLEXATTN_CUDA_TOOLKIT;
  facts["architectures"] = FLEXATTN_ARCHITECTURES;
  facts["no_cuda_reason"] = FLEXATTN_NO_CUDA_REASON;
  return facts;
}

const char* name_of(flexattn::AttentionPath path) {
  switch (path) {
    case flexattn::AttentionPath::kGeneric:
      return "generic";
    case flexattn::AttentionPath::kDecode:
      return "decode";
    case flexattn::AttentionPath::kFma:
      return "fma";
    case flexattn::AttentionPath::kVolta:
      return "volta";
    case flexattn::AttentionPath::kAmpere:
      return "ampere";
  }
  return "";
}

using Path = std::pair<std::string, std::vector<std::string>>;  // its name; reasons against a faster one

Path described(const flexattn::PathChoice& choice) { return {name_of(choice.path), choice.reasons}; }

Path attention_path(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const std::optional<at::Tensor>& k_hr, const std::optional<at::Tensor>& v_hr, double scale,
                    int capability) {
  const flexattn::AttentionInputs in = flexattn::torch_binding::attention_layout(q, k, v, k_hr, v_hr, scale);
  return described(flexattn::choose_attention_path(in, capability));
}

// For a grad_out that is dense.
Path attention_backward_path(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& k_hr, const std::optional<at::Tensor>& v_hr, double scale,
                             int capability, double softcap) {
  flexattn::AttentionBackwardParams params{};
  params.in = flexattn::torch_binding::attention_layout(q, k, v, k_hr, v_hr, scale);
  params.in.softcap = softcap;
  return described(flexattn::choose_backward_path(params, capability));
}

// Chunk and blocks of a decode call, from B * Hkv, the keys of each kind, and the blocks of a wave.
std::pair<int, int64_t> decode_splits(int64_t heads, int64_t sequence, int64_t hr, int64_t wave) {
  const flexattn::DecodeSplits splits = flexattn::choose_splits({heads, sequence, hr, wave});
  return {splits.chunk, heads * splits.all};
}

// The head and the tile of every block, in the order in which they start.
std::vector<std::pair<int, int>> block_order(int64_t heads, int64_t tiles, int64_t bytes_per_head, int64_t cache) {
  const flexattn::BlockOrder order = flexattn::order_for_cache(heads, tiles, bytes_per_head, cache);
  std::vector<std::pair<int, int>> places;
  for (int block = 0; block < order.blocks(); ++block) {
    const flexattn::BlockPlace place = order.place(block);
    places.emplace_back(place.head, place.tile);
  }
  return places;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Facts about the build of flexattn_cuda; its operators are in torch.ops.flexattn_cuda.";
  module.def("build_info", &build_info, "Return the facts behind flexattn_cuda.build.build_info as a dict of strings.");
  module.def("architecture_reason", &flexattn::torch_binding::architecture_reason,
             "See flexattn_cuda.build.architecture_reason; `architectures` is one string.");
  module.def("decode_splits", &decode_splits, "See benchmarks/decode_waves.py.");
  module.def("block_order", &block_order, "See benchmarks/l2_traffic.py.");
  module.def("attention_path", &attention_path, "See flexattn_cuda.ops.attention_path.");
  module.def("attention_backward_path", &attention_backward_path, "See flexattn_cuda.ops.attention_backward_path.");

  // flexattn_cuda.profiling
  using namespace flexattn::torch_binding;
  module.def("nvtx_compiled_in", &nvtx_compiled_in, "Return whether ranges reach NVTX.");
  module.def("nvtx_switch", [](bool on) { nvtx_switch() = on; }, "Turn the ranges of the operators on or off.");
  module.def("nvtx_push", &nvtx_push, "Begin a range on this thread, even while ranges are off.");
  module.def("nvtx_pop", &nvtx_pop, "End the innermost range of this thread.");
}
