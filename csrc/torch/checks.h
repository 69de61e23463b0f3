// Argument checks that tell every reason at once.
#pragma once

#include <ATen/ATen.h>

#include <sstream>
#include <string>
#include <vector>

#include "flexattn/types.h"

namespace flexattn::torch_binding {

class Reasons {
 public:
  explicit Reasons(const char* operation) : operation_(operation) {}

  template <typename... Parts>
  void unless(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    reasons_.push_back(text.str());
  }

  // A tensor of this dtype and these sizes (-1 = any), on `device`, with dense last dimension.
  bool tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes,
              at::Device device);
  bool tensor(const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef sizes,
              at::ArrayRef<at::ScalarType> dtypes, at::Device device) {
    return !t.has_value() || tensor(name, *t, sizes, dtypes, device);
  }

  bool ok() const { return reasons_.empty(); }
  // Raises one error that lists every reason.
  void raise_if_any() const;

 private:
  const char* operation_;
  std::vector<std::string> reasons_;
};

DType dtype_of(const at::Tensor& t);

}  // namespace flexattn::torch_binding
