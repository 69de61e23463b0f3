// Dispatch over the storage types of the host.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "flexattn/storage.h"

namespace flexattn::cpu {

// Calls function(T()) with the storage type T of a dtype.
template <typename Function>
void dispatch(DType dtype, const Function& function) {
  dispatch_storage<c10::Half, c10::BFloat16>(dtype, function);
}

}  // namespace flexattn::cpu
