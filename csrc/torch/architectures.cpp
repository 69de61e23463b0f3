#include "architectures.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdio>
#include <sstream>

#ifdef FLEXATTN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace flexattn::torch_binding {

std::string architecture_reason(int major, int minor, const std::string& architectures) {
  std::istringstream entries(architectures);
  std::string list, entry;
  while (entries >> entry) {
    int code_major = 0, code_minor = 0;
    std::sscanf(entry.c_str(), "%d.%d", &code_major, &code_minor);
    const bool ptx = entry.find("+PTX") != std::string::npos, specific = entry.find_first_of("af") != std::string::npos;
    if (code_major == major && (code_minor == minor || (code_minor < minor && !specific))) return "";
    if (ptx && !specific && (code_major < major || (code_major == major && code_minor <= minor))) return "";
    list += (list.empty() ? "" : ", ") + entry;
  }
  std::ostringstream reason;
  reason << "the GPU has compute capability " << major << "." << minor << " but the kernels were compiled for " << list
         << "; rebuild with TORCH_CUDA_ARCH_LIST=" << major << "." << minor;
  return reason.str();
}

#ifdef FLEXATTN_WITH_CUDA
void require_compiled_for(int device, const char* operation) {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> checked[kMaxDevices];
  if (device < kMaxDevices && checked[device].load(std::memory_order_relaxed)) return;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string reason = architecture_reason(major, minor, FLEXATTN_ARCHITECTURES);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), "flexattn_cuda::", operation, ": ", reason);
  if (device < kMaxDevices) checked[device].store(true, std::memory_order_relaxed);
}
#endif

}  // namespace flexattn::torch_binding
