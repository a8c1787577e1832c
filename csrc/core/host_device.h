// BN_HD: a function that CPU code and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define BN_HD __host__ __device__ inline
#else
#define BN_HD inline
#endif
