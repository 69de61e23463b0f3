// Which GPUs the compiled code can run on.
#pragma once

#include <string>

namespace flexattn::torch_binding {

// Returns why none of the code compiled for `architectures` (e.g. "7.0 8.0+PTX") runs on a GPU of this compute
// capability, or an empty string if some does. Machine code runs on GPUs of its own major version and at least its
// minor version (9.0a on exactly 9.0), PTX on every GPU that is not older.
std::string architecture_reason(int major, int minor, const std::string& architectures);

// Raises NotImplementedError if no kernel of this build runs on the GPU. Each GPU is asked once.
void require_compiled_for(int device, const char* operation);

}  // namespace flexattn::torch_binding
