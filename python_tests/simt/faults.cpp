#include <torch/library.h>

#include <string>

namespace flexattn::cuda {
void run_fault(const std::string& fault, int32_t* data);
}

TORCH_LIBRARY(flexattn_faults, library) {
  library.def("run(str fault, Tensor(a!) out) -> ()", [](std::string fault, const at::Tensor& out) {
    flexattn::cuda::run_fault(fault, out.mutable_data_ptr<int32_t>());
  });
}
