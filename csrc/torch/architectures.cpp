#include "architectures.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdio>
#include <sstream>

#ifdef FLEXATTN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace flexattn::torch_binding {

std::string architecture_reason(int major, int minor, const std::string& compiled) {
  std::istringstream entries(compiled);
  std::string list, entry;
  while (entries >> entry) {
    int its_major = 0, its_minor = 0;
    std::sscanf(entry.c_str(), "%d.%d", &its_major, &its_minor);
    const bool ptx = entry.find("+PTX") != std::string::npos, specific = entry.find_first_of("af") != std::string::npos;
    if (its_major == major && (its_minor == minor || (its_minor < minor && !specific))) return "";
    if (ptx && !specific && (its_major < major || (its_major == major && its_minor <= minor))) return "";
    list += (list.empty() ? "" : ", ") + entry;
  }
  std::ostringstream reason;
  reason << "the GPU has compute capability " << major << "." << minor << ", the kernels were compiled for " << list
         << "; build again with TORCH_CUDA_ARCH_LIST=" << major << "." << minor;
  return reason.str();
}

#ifdef FLEXATTN_WITH_CUDA
void require_compiled_for(int device, const char* operation) {
  constexpr int kMostDevices = 64;
  static std::atomic<bool> known[kMostDevices];
  if (device < kMostDevices && known[device].load(std::memory_order_relaxed)) return;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string reason = architecture_reason(major, minor, FLEXATTN_ARCHITECTURES);
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), "flexattn_cuda::", operation, ": ", reason);
  if (device < kMostDevices) known[device].store(true, std::memory_order_relaxed);
}
#endif

}  // namespace flexattn::torch_binding
