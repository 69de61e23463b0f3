// Whether the code that was compiled in fits a GPU.
#pragma once

#include <string>

namespace flexattn::torch_binding {

// Why none of it does for a GPU of this compute capability; empty where some does. compiled: e.g. "7.0 8.0+PTX".
// Machine code runs on its own generation from its minor version on (9.0a: on exactly that), PTX on all that are not
// older.
std::string architecture_reason(int major, int minor, const std::string& compiled);

// Refuses a GPU on which no kernel of this build can run, before one is launched. Asks each GPU once.
void require_compiled_for(int device, const char* operation);

}  // namespace flexattn::torch_binding
