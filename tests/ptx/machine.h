// The machine that runs decoded PTX: threads, blocks and clusters, and what it remembers of every byte to find accesses
// that nothing orders. The device model, guarded memory and counters are those of tests/simt (records.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "records.h"

namespace ptx {

struct Thread;
struct Ins;
using Handler = void (*)(Thread&, const Ins&);

enum Space : uint8_t { kGeneric, kGlobal, kShared, kParam };

struct Ins {
  Handler fn = nullptr;
  int32_t d = -1, a = -1, b = -1, c = -1, e = -1;  // >= 0: a register; < -1: constant ~x; -1: none
  int32_t guard = -1;
  bool negate = false;  // of the guard
  bool strong = false;  // a volatile, relaxed, acquiring, releasing or aligned one
  bool nc = false, acquire = false, release = false;
  uint8_t n = 1, width = 0, space = kGeneric, sign = 0, kind = 0;
  int32_t v[4] = {-1, -1, -1, -1};
  int64_t off = 0;
  int32_t target = -1;
  uint32_t line = 0;
  const char* text = nullptr;  // in the module's
  uint32_t length = 0;
  uint64_t count = 0;  // how often a thread executed it
  std::string statement() const { return std::string(text, length); }
};

struct Param {
  uint32_t offset, size;
};

struct Kernel {
  std::string name, file;
  std::vector<Ins> code;
  std::vector<uint64_t> constants;
  std::vector<Param> params;
  uint32_t registers = 0, param_bytes = 0, static_shared = 0, dynamic_base = 0, max_threads = 1024, least_blocks = 1;
  uint32_t contracted = 0;  // additions that took in a product
};

// Who wrote and read some bytes last.
struct Shadow {
  uint32_t wt = 0, we = 0;  // writer (thread + 1) and its block's epoch
  uint32_t rt = 0, re = 0;  // reader, or kBlockMany | block, or kAllMany
  uint8_t watomic = 0, nc = 0, written = 0, pending = 0;
  uint32_t wline = 0, rline = 0;
};
constexpr uint32_t kBlockMany = 0x80000000u, kAllMany = 0xffffffffu;

// Shadows of a piece of memory, one for as many bytes as the smallest access has.
struct Shadows {
  uint32_t granule = 16;
  std::vector<Shadow> all;
  Shadow* of(size_t at, size_t bytes, size_t size, size_t* count);
};

using Clock = std::vector<uint32_t>;  // by block: the epoch up to which its writes are known

struct Copy {
  uint64_t from;
  uint32_t to, bytes;
};

enum State : uint8_t { kReady, kBar, kWarp, kClusterWait, kExited };

struct Block;
struct Launch;
struct SharedLine;
struct Thread {
  uint64_t* R = nullptr;
  const uint64_t* C = nullptr;
  uint32_t pc = 0, at = 0, cluster_phase = 0;
  State state = kReady;
  bool stop = false, cluster_arrived = false;
  uint16_t tid = 0;
  uint32_t global = 0;  // block * threads + tid
  Block* block = nullptr;
  Launch* launch = nullptr;
  uint32_t mask = 0;  // of the warp operation it waits in
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::unique_ptr<Clock> own, fenced, pending;
  uint64_t polled = 0;
};

struct Block {
  uint32_t id = 0, epoch = 1, waiting = 0, exited = 0;
  std::vector<Thread> threads;
  std::vector<uint64_t> registers;
  std::vector<uint8_t> shared, shared_init;
  Shadows shadows;
  std::vector<simt::WarpTraffic> warps;
  std::vector<std::vector<std::shared_ptr<SharedLine>>> shared_lines;  // by warp, where they are counted
  uint64_t bytes = 0;
  Clock known;
  uint32_t cluster_first = 0;
  bool done = false;
};

struct Launch {
  Kernel* kernel = nullptr;
  uint32_t grid_x = 1, grid = 1, threads = 256, cluster = 1, dynamic_shared = 0;
  bool cooperative = false;
  std::vector<uint8_t> params;
  std::vector<std::unique_ptr<Block>> blocks;                       // by id; null until live
  std::map<uint64_t, Clock> sync;                                   // released clocks by address
  std::map<uint32_t, std::pair<uint32_t, uint32_t>> cluster_state;  // first block -> (arrived, phase)
  uint64_t grid_word = 0;                                           // address of the two words of the grid's barrier
  uint64_t grid_arrivals = 0, instructions = 0;
  uint32_t live_blocks = 0;
  std::vector<Thread*> ready;
};

[[noreturn]] void fail(const std::string& what);

// memory.cpp
struct Access {
  bool write = false, atomic = false;
  const uint8_t* incoming = nullptr;  // what a store is about to write
};
uint8_t* reach(Thread& t, const Ins& i, uint64_t address, uint32_t bytes, uint8_t space, Access access);
void start_copy(Thread& t, const Ins& i, uint32_t to, uint64_t from, uint32_t bytes);
void commit_group(Thread& t);
void wait_groups(Thread& t, size_t left);
void forget_shadows();

// order.cpp
bool ordered(const Thread& t, uint32_t thread, uint32_t epoch);
void note(Thread& t, const Ins& i, Shadow& s, Access access, const std::string& where, bool same);
void acquire_from(Thread& t, uint64_t address);
void release_to(Thread& t, uint64_t address);
void relaxed_from(Thread& t, uint64_t address);
void relaxed_to(Thread& t, uint64_t address);
void fence(Thread& t);
void join_block(Block& b);
void join_cluster(Launch& l, uint32_t first);
void check_end_of_shared(Thread& t);

// launch.cpp
Kernel* kernel_of(const void* function);  // that the host object registered; throws where there is none

// scheduler.cpp
void run_launch(Launch& l, uint64_t seed);
void cluster_arrive(Thread& t);
void cluster_wait(Thread& t);
std::string place_of(const Launch& l, uint32_t thread);

// counts.cpp
bool counting();
void count_shared(Thread& t, const Ins& i, uint64_t at, uint32_t bytes);
void finish_shared(Block& b);
void begin_counts(Kernel& k);
void end_counts(const Kernel& k, uint32_t threads);

// control.cpp
void sync_warp(Thread& t);  // shfl, vote: performs it when all lanes are there

// parse.cpp
struct Module;
Module* load_module(const std::string& path);
Kernel* find_kernel(Module* m, const std::string& name, bool contract);
std::vector<std::string> entries_of(Module* m);
void forget_kernels(Module* m);

constexpr uint64_t kSharedWindow = 1ull << 56, kParamWindow = 1ull << 57;
constexpr uint32_t kWindowLow =
    0x5a000000u;                        // generic addresses of shared memory begin here: not at the shared address
constexpr uint32_t kSharedBase = 1024;  // where a block's shared memory begins: zero is no address

// ---- operands ----
inline uint64_t raw(const Thread& t, int32_t x) { return x >= 0 ? t.R[x] : t.C[~x]; }
template <class T>
T get(const Thread& t, int32_t x) {
  const uint64_t r = raw(t, x);
  T v;
  memcpy(&v, &r, sizeof v);
  return v;
}
// Narrow results leave zeros above, signed ones their sign: registers are as wide as the widest use.
template <class T>
void put(Thread& t, int32_t d, T v) {
  uint64_t r = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    r = static_cast<uint64_t>(static_cast<int64_t>(v));
  } else {
    memcpy(&r, &v, sizeof v);
  }
  t.R[d] = r;
}

}  // namespace ptx
