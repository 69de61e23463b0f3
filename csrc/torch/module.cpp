// flexattn_cuda._C: what is not an operator. Importing it also loads the operators' registrations.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#define FLEXATTN_TEXT_(...) #__VA_ARGS__
#define FLEXATTN_TEXT(...) FLEXATTN_TEXT_(__VA_ARGS__)

#ifndef FLEXATTN_CUDA_TOOLKIT
#define FLEXATTN_CUDA_TOOLKIT
#endif
#ifndef FLEXATTN_ARCHITECTURES
#define FLEXATTN_ARCHITECTURES
#endif

namespace {

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["version"] = FLEXATTN_TEXT(FLEXATTN_VERSION);
  facts["torch"] = TORCH_VERSION;
#ifdef __VERSION__
  facts["compiler"] = __VERSION__;
#else
  facts["compiler"] = "unknown";
#endif
  facts["cuda_state"] = FLEXATTN_CUDA_STATE;
  facts["cuda_toolkit"] = FLEXATTN_TEXT(FLEXATTN_CUDA_TOOLKIT);
  facts["architectures"] = FLEXATTN_TEXT(FLEXATTN_ARCHITECTURES);
  return facts;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Facts about the build of flexattn_cuda; its operators are in torch.ops.flexattn_cuda.";
  module.def("build_facts", &build_facts, "What was compiled in, as a dict; see flexattn_cuda.build.");
}
