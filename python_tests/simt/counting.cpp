// Counting of memory accesses (csrc/simt/access_counts.h), for Python.

#include "access_counts.h"

#include <torch/library.h>

TORCH_LIBRARY(flexattn_access_counts, library) {
  library.def("start() -> ()", [] { flexattn::simt::start_counting(); });
  library.def("json() -> str", [] { return flexattn::simt::access_counts(); });
}
