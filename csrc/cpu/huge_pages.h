// Asks the system to back a fresh large tensor with huge pages: one page fault for 2 MB instead of 512.
// Linux grants it where /sys/kernel/mm/transparent_hugepage/enabled says "madvise" or "always".
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bn_ext {
namespace cpu {

constexpr size_t kHugePage = size_t(2) << 20;

inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;  // may not hold one whole huge page
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(kHugePage - 1);
  // Advice only: where it is refused the tensor works as before.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace cpu
}  // namespace bn_ext
