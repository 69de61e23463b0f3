#include "checks.h"

#include <algorithm>

#include "overlap.h"

namespace flexattn::torch_binding {
namespace {

bool sizes_fit(at::IntArrayRef given, at::IntArrayRef expected) {
  return std::equal(given.begin(), given.end(), expected.begin(), expected.end(),
                    [](int64_t size, int64_t wanted) { return wanted < 0 || size == wanted; });
}

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

std::string dtypes_text(at::ArrayRef<at::ScalarType> dtypes) {
  std::ostringstream text;
  for (size_t i = 0; i < dtypes.size(); ++i) text << (i ? " or " : "") << dtypes[i];
  return text.str();
}

}  // namespace

bool Reasons::tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes,
                     at::Device device) {
  const size_t before = reasons_.size();
  if (!sizes_fit(t.sizes(), sizes))
    unless(false, name, " has shape ", sizes_text(t.sizes()), ", expected ", sizes_text(sizes));
  if (std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) == dtypes.end())
    unless(false, name, " has dtype ", t.scalar_type(), ", expected ", dtypes_text(dtypes));
  unless(t.device() == device, name, " is on ", t.device(), ", expected ", device, " as the first argument");
  unless(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, name, " has stride ", t.dim() ? t.stride(-1) : 0,
         " in its last dimension, expected 1");
  return reasons_.size() == before;
}

void Reasons::values_within(const char* name, const at::Tensor& index, int64_t min, int64_t max) {
  if (!readable(index)) return;
  const at::Tensor dense = index.contiguous();
  const auto [found_min, found_max] = std::minmax_element(ints(dense), ints(dense) + dense.numel());
  unless(*found_min >= min && *found_max <= max, name, " has values from ", *found_min, " to ", *found_max,
         ", expected ", min, " to ", max);
}

void Reasons::fractions(const char* name, const at::Tensor& t) {
  if (!readable(t)) return;
  const at::Tensor dense = t.contiguous();
  for (const float *x = dense.const_data_ptr<float>(), *end = x + dense.numel(); x != end; ++x)
    if (!(*x >= 0 && *x <= 1)) return unless(false, name, " holds ", *x, ", expected values from 0 to 1");
}

void Reasons::distinct_in_rows(const char* name, const at::Tensor& index, int64_t count) {
  if (!readable(index)) return;
  const at::Tensor dense = index.contiguous();
  const int64_t rows = dense.size(0), columns = dense.size(1);
  std::vector<bool> seen;
  for (int64_t row = 0; row < rows; ++row) {
    seen.assign(count, false);
    for (int64_t column = 0; column < columns; ++column) {
      const int32_t value = ints(dense)[row * columns + column];
      if (value < 0) continue;
      unless(!seen[value], name, " holds ", value, " twice in row ", row);
      if (seen[value]) return;
      seen[value] = true;
    }
  }
}

void Reasons::writable(const char* name, const at::Tensor& t) {
  unless(!t.is_neg(), name, " is written but is a negative view; pass a tensor of its own");
  unless(!overlaps_itself(t), name, " is written but several of its elements share memory; pass a tensor of its own");
}

void Reasons::disjoint(const char* written_name, const at::Tensor& written, const char* other_name,
                       const at::Tensor& other) {
  unless(!overlap(written, other), written_name, " is written but shares memory with ", other_name,
         "; pass separate tensors");
}

void Reasons::raise_if_any() const {
  if (reasons_.empty()) return;
  std::ostringstream text;
  text << "flexattn_cuda::" << operation_ << ": ";
  for (size_t i = 0; i < reasons_.size(); ++i) text << (i ? "; " : "") << reasons_[i];
  TORCH_CHECK_VALUE(false, text.str());
}

}  // namespace flexattn::torch_binding
