// Which values of a padded batch count: x[n, :, l] of the valid pairs (n, l).
#pragma once

#include <cstdint>

#include "tensors.h"

namespace bn_ext {

struct Valid {
  const int64_t* lengths = nullptr;  // (N,): l < lengths[n]
  const uint8_t* mask = nullptr;     // (N, L), one row after the other; any byte but 0 counts, as in torch
  BN_HD explicit operator bool() const { return lengths != nullptr || mask != nullptr; }
  // length: L.
  BN_HD bool at(int64_t n, int64_t l, int64_t length) const {
    return lengths != nullptr ? l < lengths[n] : mask[n * length + l] != 0;
  }
};

BN_HD Valid from_sample(Valid v, int64_t n, const Shape& shape) {
  if (v.lengths) v.lengths += n;
  if (v.mask) v.mask += n * shape.l;
  return v;
}

// Values of a channel that count.
inline int64_t valid_count(const Valid& v, const Shape& shape) {
  if (!v) return shape.count();
  int64_t count = 0;
  for (int64_t i = 0; i < (v.lengths ? shape.n : shape.count()); ++i) {
    count += v.lengths ? v.lengths[i] : v.mask[i] != 0;
  }
  return count;
}

}  // namespace bn_ext
