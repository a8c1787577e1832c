// What both machines share, the one of g++'s code and that of PTX (tests/ptx): device_model.cpp answers for the device,
// memory.cpp owns the guarded memory, traffic.cpp counts.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "simt/hooks.h"

namespace simt {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating type, -1 in every integer

// ---- device model ----
struct Device {
  const char* name;
  long cc_major, cc_minor, sms, shared_per_sm, shared_per_block, threads_per_sm, blocks_per_sm, l2_bytes, sms_per_gpc;
  long registers;      // a thread, of every kernel: occupancy follows from it
  long static_shared;  // bytes a block, of every kernel: likewise
  long cooperative = 1;
  long cache_bytes = 0;  // of a second-level cache whose misses are counted, 0: of none
};
const Device& device();
// cudaSuccess and the launch's cluster size and cooperative flag, or what CUDA would refuse it with.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel, unsigned* cluster, bool* cooperative);
int blocks_per_sm(int threads, size_t dynamic_bytes);
cudaError_t remember(cudaError_t error);

// ---- memory ----
// Lies between two pages that nobody may touch.
struct Buffer {
  int id = 0;
  std::string name;
  char *map = nullptr, *begin = nullptr;
  size_t map_bytes = 0, bytes = 0;
  bool sparse = false, internal = false;
  bool filled = false, constant = false;  // by the host; what no kernel may write
  std::vector<uint8_t> written;           // of a buffer that is not filled: whether each byte was written
  std::vector<uint8_t> cover[2];          // how often this launch read and wrote each byte
  std::vector<uint64_t> used;             // when each sector was last used, by the counted cache's clock
};

void* allocate_guarded(const char* name, size_t bytes, size_t align, bool left, bool sparse);
void free_guarded(void* pointer);
Buffer* buffer_at(const void* address);  // its guard pages count as its own; nullptr: in none
std::string place(const Buffer& b, const void* address);
std::map<int, Buffer>& live_buffers();
const std::string& name_of_buffer(int id);  // of any that there ever was
int buffers_ever();
std::string first_overwritten();                    // a buffer whose slack was written, "" if none
bool fill(void* pointer, int value, size_t bytes);  // false: outside of the buffer

// ---- counters ----
// A warp's accesses from one line to one tensor; the k-th of each lane are taken as one warp access.
struct LineTraffic {
  struct Access {
    uint32_t lanes = 0, bytes = 0, sectors[32];
    bool last_use = false;
  };
  Site site;
  int buffer;
  bool write;
  uint64_t first = 0;      // index of accesses.front()
  uint64_t next[32] = {};  // by lane
  std::deque<Access> accesses;
};

struct WarpTraffic {
  uint32_t exist = 0;  // its lanes
  std::vector<LineTraffic> lines;
};

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
  std::map<int, uint64_t> missed;        // bytes that were read and not in the cache
};

void begin_launch(const Launch& launch);  // counting starts
Launch& launch_record();
// last_use: such a sector leaves the cache first.
void count_access(WarpTraffic* warp, int lane, Site site, Buffer* buffer, const void* address, int bytes, bool write,
                  bool last_use = false);
void finish_warp(WarpTraffic* warp);  // its accesses are complete
void finish_block(uint64_t linear, uint64_t bytes);
void end_launch();
void set_error(const std::string& message);

}  // namespace simt
