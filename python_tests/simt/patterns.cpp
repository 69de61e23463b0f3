#include <torch/library.h>

#include <string>

namespace flexattn::cuda {
void run_pattern(const std::string& pattern, int64_t stride, unsigned char* data);
}

TORCH_LIBRARY(flexattn_patterns, library) {
  library.def("run(str pattern, int stride, Tensor(a!) data) -> ()",
              [](std::string pattern, int64_t stride, const at::Tensor& data) {
                flexattn::cuda::run_pattern(pattern, stride, data.mutable_data_ptr<uint8_t>());
              });
}
