// The C entries that Python calls; a launcher's structs are filled here.
#include "toy.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define ENTRY extern "C" __attribute__((visibility("default"))) int

ENTRY toy_moments(const float* x, float* mean, float* m2, int64_t rows, int64_t n) {
  return toy::moments(toy::Moments{x, mean, m2, rows, n}, nullptr);
}
ENTRY toy_center(const float* x, float* y, float* partial, unsigned* arrivals, int64_t n) {
  return toy::center(toy::Center{x, y, partial, arrivals, n}, nullptr);
}
ENTRY toy_center_by_clusters(const float* x, float* y, int64_t n, int64_t cluster) {
  return toy::center_by_clusters(toy::Center{x, y, nullptr, nullptr, n}, static_cast<int>(cluster), nullptr);
}
ENTRY toy_copy(const float* x, float* y, int64_t n, int64_t stride) {
  return toy::copy(toy::Copy{x, y, n, stride}, nullptr);
}
ENTRY toy_fault(int64_t kind, float* x, int64_t n) { return toy::fault(static_cast<int>(kind), x, n, nullptr); }

// The 16-bit types of the stand-in: rounded from double, and back.
ENTRY toy_round(const double* x, float* as_half, float* as_bfloat16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    as_half[i] = __half2float(__double2half(x[i]));
    as_bfloat16[i] = __bfloat162float(__double2bfloat16(x[i]));
  }
  return 0;
}
