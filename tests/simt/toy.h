// Launchers of the toy kernels: the form that a real .cu and its header have.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace toy {

struct Moments {
  const float* x;  // (rows, n)
  float *mean, *m2;
  int64_t rows, n;
};

struct Center {
  const float* x;
  float* y;            // x - mean(x)
  float* partial;      // one sum a block
  unsigned* arrivals;  // zero before and after; nullptr: the grid's own barrier is used
  int64_t n;
};

struct Copy {
  const float* x;
  float* y;
  int64_t n, stride;  // y[i * stride] = x[i * stride]
};

int center_blocks(int64_t n);
cudaError_t moments(const Moments& args, cudaStream_t stream);
cudaError_t center(const Center& args, cudaStream_t stream);
cudaError_t center_by_clusters(const Center& args, int cluster, cudaStream_t stream);
cudaError_t copy(const Copy& args, cudaStream_t stream);
cudaError_t fault(int kind, float* x, int64_t n, cudaStream_t stream);

}  // namespace toy
