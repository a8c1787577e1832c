// The parts of the stand-in runtime as they see each other: fibers.cpp switches stacks, scheduler.cpp runs the blocks
// of a launch, threads.cpp is what their threads call, traffic.cpp owns the guarded memory and the counters,
// device_model.cpp answers for the device.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace simt {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating type, -1 in every integer

// ---- device model ----
struct Device {
  const char* name;
  long cc_major, cc_minor, sms, shared_per_sm, shared_per_block, threads_per_sm, blocks_per_sm, l2_bytes, sms_per_gpc;
  long registers;      // a thread, of every kernel: occupancy follows from it
  long static_shared;  // bytes a block, of every kernel: likewise
  long cooperative = 1;
};
const Device& device();
// cudaSuccess and the launch's cluster size and cooperative flag, or what CUDA would refuse it with.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel, unsigned* cluster, bool* cooperative);
int blocks_per_sm(int threads, size_t dynamic_bytes);
cudaError_t remember(cudaError_t error);

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

// A warp's accesses from one source line to one tensor; the k-th of each lane are taken as one warp access.
struct LineTraffic {
  struct Access {
    uint32_t lanes = 0, bytes = 0, sectors[32];
  };
  Site site;
  int buffer;
  bool write;
  uint64_t first = 0;      // index of accesses.front()
  uint64_t next[32] = {};  // by lane
  std::deque<Access> accesses;
};

struct Warp {
  uint32_t exist = 0, waiting = 0, done = 0;
  std::vector<LineTraffic> lines;
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

// ---- memory and counters ----
struct Counter {
  uint64_t bytes = 0, accesses = 0, sectors = 0, ideal_sectors = 0;
};

struct Launch {
  const void* kernel = nullptr;
  dim3 grid, block;
  unsigned cluster = 1;
  bool cooperative = false;
  size_t dynamic_shared = 0;
  int blocks_per_sm = 0;
  uint64_t grid_barriers = 0;
  std::vector<uint64_t> block_bytes;
  std::map<int, Counter> reads, writes;  // by buffer, -1: memory that is no buffer
};

void* allocate_guarded(const char* name, size_t bytes, size_t align, bool left, bool sparse);
void free_guarded(void* pointer);
void begin_launch(const Launch& launch);  // counting starts; faults are caught
Launch& launch_record();
void finish_block(Block& block);  // its warps' accesses are complete
void end_launch();
std::string first_overwritten();  // a buffer whose slack was written, "" if none
void set_error(const std::string& message);

}  // namespace simt
