// Whether elements of tensors share memory. Exact for every view that slicing, transposing and expanding make; of other
// views, which as_strided makes, some count as overlapping although they are not.
#pragma once

#include <ATen/ATen.h>

namespace flexattn::torch_binding {

// Whether two elements of the tensor share memory.
bool overlaps_itself(const at::Tensor& t);

// Whether an element of one tensor shares memory with one of the other.
bool overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace flexattn::torch_binding
