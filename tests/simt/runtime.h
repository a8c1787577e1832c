// The parts of the stand-in runtime as they see each other: fibers.cpp switches stacks, scheduler.cpp runs the blocks
// of a launch, threads.cpp is what their threads call, signals.cpp turns their faults into errors. The rest is shared
// with tests/ptx: see records.h.
#pragma once

#include <memory>

#include "cuda_runtime.h"
#include "records.h"

namespace simt {

// ---- threads ----
struct Block;

struct Wait {
  const char* what = nullptr;  // nullptr: not waiting
  unsigned mask = 0;
  Site site;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Thread {
  void* stack = nullptr;
  void* context = nullptr;  // saved stack pointer, or ucontext_t
  Block* block = nullptr;
  uint3 index{};
  int linear = 0;
  bool done = false;
  Wait wait;
  uint64_t phase[3] = {};  // by Scope: number of barriers that this thread has arrived at
  uint64_t value = 0;      // what it brings to an exchange, then what it gets
  int source_lane = 0;
  std::vector<Copy> copies;
  int copy_group = 0;
};

struct Warp : WarpTraffic {
  uint32_t waiting = 0, done = 0;
};

struct Barrier {
  Wait wait;  // what the first to arrive waits in
  uint64_t phase = 0;
  int64_t threads = 0, arrived = 0, done = 0;
  Votes votes, result;
  std::vector<Thread*> waiters;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  Barrier barrier;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  bool listed = false;       // in Running::with_ready
  std::vector<char> shared;  // static shared memory while another block runs
  char* dynamic = nullptr;
  uint64_t bytes = 0;  // tensor traffic
};

struct Running {
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::vector<Block*> with_ready;  // live blocks that have a thread to run
  Block* loaded = nullptr;         // whose static shared memory is in place
  Barrier grid;
  std::vector<std::unique_ptr<Cluster>> clusters;  // live
  uint64_t idle_polls = 0, live_threads = 0;
};

extern Running run;
extern char* shared_base;  // the kernels' static shared memory
extern size_t shared_bytes;
void make_ready(Thread* t);
std::string text_of(const Wait& wait);
std::string describe_waits();

// Stacks (fibers.cpp). to_thread returns when the thread calls to_scheduler; a thread starts in thread_main.
void* take_stack();
void give_stack(void* stack);
bool stack_intact(const Thread& t);
void make_context(Thread& t);
void to_thread(Thread& t);
void to_scheduler();
void thread_main();

// The thread that runs now; nullptr outside a launch.
extern Thread* current;
uint64_t random_below(uint64_t n);
void seed_random(uint64_t seed);
std::string describe_thread();
// From a signal handler, or wherever no return is possible: ends the launch with this error.
[[noreturn]] void abandon(const std::string& message, cudaError_t error);
void catch_faults();
void release_faults();

}  // namespace simt
