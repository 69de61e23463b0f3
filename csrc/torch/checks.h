// Argument checks that report every reason at once. Nothing is formatted unless a check fails.
#pragma once

#include <ATen/ATen.h>

#include <sstream>
#include <string>
#include <vector>

#include "tensors.h"

namespace flexattn::torch_binding {

inline constexpr at::ScalarType kInt[] = {at::kInt};
inline constexpr at::ScalarType kFloat[] = {at::kFloat};
inline constexpr at::ScalarType kFloatingPoint[] = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};

class Reasons {
 public:
  explicit Reasons(const char* operation) : operation_(operation) {}

  // Adds the reason that `parts` spell out unless the condition holds.
  template <typename... Parts>
  void unless(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    reasons_.push_back(text.str());
  }

  // Requires these sizes (-1 = any), one of these dtypes, this device, and a dense last dimension. Returns whether all
  // of it holds; false, without a reason, for an absent tensor.
  bool tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes,
              at::Device device);
  bool tensor(const char* name, const OptionalTensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes,
              at::Device device) {
    return t && tensor(name, *t, sizes, dtypes, device);
  }

  // The values of index tensors are checked on the CPU only: reading them from a GPU would wait for it.
  void values_within(const char* name, const at::Tensor& index, int64_t min, int64_t max);
  void fractions(const char* name, const at::Tensor& t);  // 0 to 1, float32
  // A row of the [rows, columns] index may repeat -1 but no other value. Values must lie in -1 to `count` - 1.
  void distinct_in_rows(const char* name, const at::Tensor& index, int64_t count);

  // Requires that no two elements of a tensor that is written share memory, and that it is not a negative view.
  void writable(const char* name, const at::Tensor& t);
  // Requires that a tensor that is written shares no memory with another argument.
  void disjoint(const char* written_name, const at::Tensor& written, const char* other_name, const at::Tensor& other);

  bool ok() const { return reasons_.empty(); }
  // Raises one ValueError that lists every reason.
  void raise_if_any() const;

 private:
  const char* operation_;
  std::vector<std::string> reasons_;
};

// Whether the values can be read without waiting for a device.
inline bool readable(const at::Tensor& t) { return t.is_cpu() && t.numel() > 0; }

}  // namespace flexattn::torch_binding
