// What the stand-in headers and the kernels' memory helpers ask of the runtime (scheduler.cpp, traffic.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// Where in the kernel's source a call stands: the default argument of every intrinsic.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Votes {
  int any = 0, all = 0, count = 0;
};

enum class Scope { kBlock, kCluster, kGrid };

// Barriers: arrive and wait are two halves; every thread of the scope takes part, at the same source line.
void arrive(Scope scope, const char* what, int predicate, Site site);
Votes wait(Scope scope, const char* what, Site site);

// All lanes of `mask` meet; each gets the value of its source lane (poison if that lane takes no part).
uint64_t exchange(const char* what, unsigned mask, uint64_t value, int source_lane, Site site);
unsigned ballot(const char* what, unsigned mask, bool predicate, Site site);
int lane();

// A thread that may be waiting for a change at `address` steps aside; one that changed what others wait for says so.
void poll(const void* address, const char* what, Site site);
void changed();
// A point where another thread may run next, once in `one_in` times.
void preempt(unsigned one_in = 8);

void* dynamic_shared();
void* map_shared(void* pointer, unsigned rank);
unsigned cluster_size();
unsigned cluster_rank();

// Access to a tensor in global memory by the helpers of csrc/cuda/memory.cuh: checked, and counted by tensor. last_use:
// the caches are told that nobody reads it again.
void touch(const void* address, int bytes, bool write, Site site, bool last_use = false);

// Asynchronous copies become visible at the wait that covers them, not before.
void copy_async(void* shared, const void* global, int bytes, Site site);
void copy_async_commit();
void copy_async_wait(int groups_left);

// Ends the launch with an error that names the calling thread.
[[noreturn]] void fail(const std::string& message);

}  // namespace simt
