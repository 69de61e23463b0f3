// flexattn_cuda._C: what is not an operator. Importing it also loads the operators' registrations.
// setup.py defines the FLEXATTN_ facts.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "nvtx.h"

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
  facts["torch"] = TORCH_VERSION;
  facts["compiler"] = compiler();
  facts["cuda_toolkit"] = FLEXATTN_CUDA_TOOLKIT;
  facts["architectures"] = FLEXATTN_ARCHITECTURES;
  facts["no_cuda_reason"] = FLEXATTN_NO_CUDA_REASON;
  return facts;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Facts about the build of flexattn_cuda; its operators are in torch.ops.flexattn_cuda.";
  module.def("build_info", &build_info, "What was compiled in, as a dict of strings; see flexattn_cuda.build.");

  // flexattn_cuda.profiling
  using namespace flexattn::torch_binding;
  module.def("nvtx_compiled_in", &nvtx_compiled_in, "Whether the ranges reach NVTX.");
  module.def("nvtx_switch", [](bool on) { nvtx_switch() = on; }, "Turns the operators' ranges on or off.");
  module.def("nvtx_push", &nvtx_push, "Begins a range on this thread, whatever the switch says.");
  module.def("nvtx_pop", &nvtx_pop, "Ends the last one begun on this thread.");
}
