#include "checks.h"

namespace flexattn::torch_binding {
namespace {

std::string sizes_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i) text << ", ";
    if (sizes[i] < 0)
      text << '*';
    else
      text << sizes[i];
  }
  text << ']';
  return text.str();
}

}  // namespace

bool Reasons::tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes,
                     at::Device device) {
  const size_t before = reasons_.size();
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || sizes[i] == t.size(i);
  unless(fits, name, " has shape ", sizes_text(t.sizes()), ", it must be ", sizes_text(sizes));
  bool known = false;
  std::ostringstream allowed;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    known |= t.scalar_type() == dtypes[i];
    allowed << (i ? " or " : "") << dtypes[i];
  }
  unless(known, name, " has dtype ", t.scalar_type(), ", it must be ", allowed.str());
  unless(t.device() == device, name, " is on ", t.device(), ", the first argument on ", device);
  unless(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, name, " has stride ", t.dim() ? t.stride(-1) : 0,
         " in its last dimension, it must be 1");
  return reasons_.size() == before;
}

void Reasons::raise_if_any() const {
  if (reasons_.empty()) return;
  std::ostringstream text;
  text << "flexattn_cuda::" << operation_ << ": ";
  for (size_t i = 0; i < reasons_.size(); ++i) text << (i ? "; " : "") << reasons_[i];
  TORCH_CHECK_VALUE(false, text.str());
}

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, "flexattn_cuda: dtype ", t.scalar_type(),
                        " is not float64, float32, float16 or bfloat16");
  }
}

}  // namespace flexattn::torch_binding
