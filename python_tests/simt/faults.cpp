#include <torch/library.h>

#include <string>

namespace flexattn::cuda {
void run_fault(const std::string& fault, int32_t* data);
void run_bad_value(const std::string& argument, int64_t index, int64_t value, int64_t queries, bool listed,
                   const std::string& pass);
}  // namespace flexattn::cuda

TORCH_LIBRARY(flexattn_faults, library) {
  library.def("run(str fault, Tensor(a!) out) -> ()", [](std::string fault, const at::Tensor& out) {
    flexattn::cuda::run_fault(fault, out.mutable_data_ptr<int32_t>());
  });
  library.def("bad_value(str argument, int index, int value, int queries, bool listed, str of) -> ()",
              [](std::string argument, int64_t index, int64_t value, int64_t queries, bool listed, std::string pass) {
                flexattn::cuda::run_bad_value(argument, index, value, queries, listed, pass);
              });
}
