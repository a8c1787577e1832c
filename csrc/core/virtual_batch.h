// Virtual batches (ghost batch normalisation, Hoffer et al. 2017, "Train longer, generalize better"): a batch cut along
// N, each piece normalised by its own statistics, and the running ones moved piece by piece.
#pragma once

#include "tensors.h"

namespace bn_ext {

// N samples as torch.chunk cuts them into ceil(N / wanted) pieces of one size, the last one smaller; where that would
// have one value a channel it joins the piece before it.
struct VirtualBatches {
  int64_t count = 1, size = 0;  // size: of every piece but the last
  BN_HD int64_t begin(int64_t i) const { return i * size; }
  BN_HD int64_t samples(int64_t i, int64_t n) const { return i + 1 < count ? size : n - begin(i); }
};

// At most this many pieces come of N samples; forward's `saved` has room for so many.
inline int64_t most_virtual_batches(int64_t n, int64_t wanted) {
  return wanted > 0 && n > 0 ? n / wanted + (n % wanted != 0) : 1;
}

// wanted = 0: one batch.
inline VirtualBatches cut(const Shape& shape, int64_t wanted) {
  VirtualBatches v;
  const int64_t pieces = most_virtual_batches(shape.n, wanted);
  v.size = shape.n / pieces + (shape.n % pieces != 0);
  if (v.size == 0) return v;
  v.count = shape.n / v.size + (shape.n % v.size != 0);
  if (v.count > 1 && v.samples(v.count - 1, shape.n) * shape.l == 1) --v.count;
  return v;
}

}  // namespace bn_ext
