// flexattn_cuda._C: what is not an operator. Importing it also loads the operators' registrations.
// setup.py defines the FLEXATTN_ facts.

#include <pybind11/pybind11.h>
#include <torch/version.h>

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
}
