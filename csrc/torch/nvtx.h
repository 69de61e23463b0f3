// NVTX ranges for Nsight Systems and Nsight Compute, in the domain "flexattn_cuda". Off by default. In a build without
// CUDA there are none and the switch does nothing.
#pragma once

#include <atomic>

#if defined(FLEXATTN_WITH_CUDA) && __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define FLEXATTN_WITH_NVTX
#endif

namespace flexattn::torch_binding {

inline std::atomic<bool>& nvtx_switch() {
  static std::atomic<bool> on{false};
  return on;
}

constexpr bool nvtx_compiled_in() {
#ifdef FLEXATTN_WITH_NVTX
  return true;
#else
  return false;
#endif
}

#ifdef FLEXATTN_WITH_NVTX
inline nvtxDomainHandle_t nvtx_domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("flexattn_cuda");
  return domain;
}

inline void nvtx_push(const char* name) {
  nvtxEventAttributes_t range{};
  range.version = NVTX_VERSION;
  range.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  range.messageType = NVTX_MESSAGE_TYPE_ASCII;
  range.message.ascii = name;
  nvtxDomainRangePushEx(nvtx_domain(), &range);
}
inline void nvtx_pop() { nvtxDomainRangePop(nvtx_domain()); }
#else
inline void nvtx_push(const char*) {}
inline void nvtx_pop() {}
#endif

// A range from here to the end of the scope, even if the switch is turned off in between.
class NvtxRange {
 public:
  explicit NvtxRange(const char* name) : pushed_(nvtx_switch().load(std::memory_order_relaxed)) {
    if (pushed_) nvtx_push(name);
  }
  ~NvtxRange() {
    if (pushed_) nvtx_pop();
  }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;

 private:
  const bool pushed_;
};

}  // namespace flexattn::torch_binding
