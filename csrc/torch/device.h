// Where a call runs: on the CPU, on a GPU's current stream, or nowhere, with the reason.
#pragma once

#include <ATen/ATen.h>

#include "architectures.h"
#include "flexattn/types.h"

#ifdef FLEXATTN_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace flexattn::torch_binding {

// Calls function(params, stream) of the namespace cpu or cuda, whichever fits the device of `like`.
#if defined(FLEXATTN_SIMT)  // tests: the CUDA kernels on CPU tensors (csrc/simt)
#define FLEXATTN_LAUNCH(function, params, like) ::flexattn::cuda::function(params, nullptr)
#elif defined(FLEXATTN_WITH_CUDA)
#define FLEXATTN_LAUNCH(function, params, like)                                            \
  [&] {                                                                                    \
    if (!(like).is_cuda()) return ::flexattn::cpu::function(params, nullptr);              \
    ::flexattn::torch_binding::require_compiled_for((like).device().index(), #function);   \
    const c10::cuda::CUDAGuard guard((like).device());                                     \
    return ::flexattn::cuda::function(params, c10::cuda::getCurrentCUDAStream().stream()); \
  }()
#else
#define FLEXATTN_LAUNCH(function, params, like)                                                                       \
  [&] {                                                                                                               \
    TORCH_CHECK_NOT_IMPLEMENTED(                                                                                      \
        !(like).is_cuda(), "flexattn_cuda::" #function ": this build has no CUDA kernels, but the tensors are on ",   \
        (like).device(),                                                                                              \
        "; rebuild with a CUDA toolkit and a CUDA build of torch (`flexattn info` shows what was found) or move the " \
        "tensors to the CPU");                                                                                        \
    return ::flexattn::cpu::function(params, nullptr);                                                                \
  }()
#endif

}  // namespace flexattn::torch_binding
