#include "overlap.h"

#include <algorithm>
#include <vector>

namespace flexattn::torch_binding {
namespace {

struct Dimension {
  int64_t size, stride;  // in elements
};

// Offset of the last element from the first.
int64_t reach(const at::Tensor& t) {
  int64_t offset = 0;
  for (int64_t i = 0; i < t.dim(); ++i) offset += (t.size(i) - 1) * t.stride(i);
  return offset;
}

// Offsets are distinct if every dimension steps over everything that the dimensions with smaller strides reach.
bool offsets_repeat(std::vector<Dimension> dimensions) {
  std::sort(dimensions.begin(), dimensions.end(), [](const auto& a, const auto& b) { return a.stride < b.stride; });
  int64_t reached = 0;
  for (const Dimension& dimension : dimensions) {
    if (dimension.size <= 1) continue;
    if (dimension.stride <= reached) return true;
    reached += (dimension.size - 1) * dimension.stride;
  }
  return false;
}

}  // namespace

bool overlaps_itself(const at::Tensor& t) {
  if (t.numel() == 0) return false;
  std::vector<Dimension> dimensions;
  for (int64_t i = 0; i < t.dim(); ++i) dimensions.push_back({t.size(i), t.stride(i)});
  return offsets_repeat(std::move(dimensions));
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto first_a = reinterpret_cast<intptr_t>(a.const_data_ptr());
  const auto first_b = reinterpret_cast<intptr_t>(b.const_data_ptr());
  const int64_t element = a.element_size();
  const intptr_t end_a = first_a + (reach(a) + 1) * element;
  const intptr_t end_b = first_b + (reach(b) + 1) * b.element_size();
  if (end_a <= first_b || end_b <= first_a) return false;

  // Their ranges interleave. Two parts of one buffer have the same strides: they are then one tensor with a further
  // dimension of size 2, from the first element of one to that of the other.
  const int64_t apart = std::abs(first_a - first_b);
  if (a.element_size() != b.element_size() || a.strides() != b.strides() || apart % element) return true;
  std::vector<Dimension> dimensions = {{2, apart / element}};
  for (int64_t i = 0; i < a.dim(); ++i) dimensions.push_back({std::max(a.size(i), b.size(i)), a.stride(i)});
  return offsets_repeat(std::move(dimensions));
}

}  // namespace flexattn::torch_binding
