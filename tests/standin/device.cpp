// The device behind the runtime's entries: memory, launches and figures of the machine in tests/ptx.
#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "machine.h"
#include "standin.h"

extern "C" {
// launch.cpp's entries, renamed (build.py)
cudaError_t machine_launch(const cudaLaunchConfig_t* config, const void* function, void** arguments);
cudaError_t machine_set_attribute(const void* function, cudaFuncAttribute attribute, int value);
void machine_register_function(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                               int*);
int ptx_load(int place, const char* path);
void ptx_choose(int place, int architecture, int contract);
int simt_device(const char* name);
int simt_set(const char* key, long value);
long simt_get(const char* key);
void simt_seed(uint64_t seed);
void simt_reset();
const char* simt_error();
}

namespace standin {
namespace {

constexpr int kArchitecture = 90;
constexpr size_t kTotal = size_t{8} << 30;
size_t used = 0;
std::map<int, int> devices;  // by buffer

long setting(const char* name, long otherwise) {
  const char* const said = getenv(name);
  return said ? atol(said) : otherwise;
}

// Two of the H200's GPCs, so that all exchanges between blocks are chosen, of grids that are soon interpreted.
void settle() {
  static const bool once = [] {
    simt_device("H200");
    simt_set("sms", setting("STANDIN_SMS", 32));
    const long capability = setting("STANDIN_CAPABILITY", kArchitecture);
    simt_set("cc_major", capability / 10), simt_set("cc_minor", capability % 10);
    simt_seed(static_cast<uint64_t>(setting("STANDIN_SEED", 0)));
    ptx_choose(kArchitecture, kArchitecture, 0);
    return true;
  }();
  (void)once;
}

// The PTX of all element types, at the first launch: most processes have none.
void load() {
  static const bool once = [] {
    const char* const said = getenv("STANDIN_PTX");
    std::istringstream paths(said ? said : "");
    for (std::string path; std::getline(paths, path, ':');) {
      if (!ptx_load(kArchitecture, path.c_str())) ptx::fail(simt_error());
    }
    return true;
  }();
  (void)once;
}

size_t offset(const simt::Buffer& b, const void* p) { return static_cast<const char*>(p) - b.begin; }

// The buffer that holds [p, p + bytes), nullptr for the host's memory; throws where it holds only a part.
simt::Buffer* buffer_of(const void* p, size_t bytes) {
  simt::Buffer* const b = simt::buffer_at(p);
  if (!b) return nullptr;
  const char* const at = static_cast<const char*>(p);
  if (at < b->begin || at + bytes > b->begin + b->bytes) {
    ptx::fail(std::to_string(bytes) + " bytes at " + simt::place(*b, p));
  }
  return b;
}

uint8_t* written(simt::Buffer* b, const void* p) {
  if (b->written.empty()) b->written.resize(b->bytes);
  return b->written.data() + offset(*b, p);
}

}  // namespace

std::recursive_mutex& mutex() {
  static std::recursive_mutex* const all = new std::recursive_mutex;  // is used until the process ends
  return *all;
}

void* allocate(size_t bytes, int device) {
  const Lock lock(mutex());
  static uint64_t number = 0;
  if (used + bytes > kTotal) return nullptr;
  const std::string name = "allocation " + std::to_string(number++);
  void* const p = simt::allocate_guarded(name.c_str(), std::max<size_t>(bytes, 1), 256, false, false);
  if (!p) return nullptr;
  simt::Buffer* const b = simt::buffer_at(p);
  b->internal = true;                                     // its traffic is not counted
  b->filled = !getenv("PYTORCH_NO_CUDA_MEMORY_CACHING");  // torch gives parts out again: who wrote is not known
  devices[b->id] = device;
  used += bytes;
  return p;
}

bool release(void* pointer) {
  const Lock lock(mutex());
  simt::Buffer* const b = simt::buffer_at(pointer);
  if (!b || b->begin != pointer) return false;
  used -= std::min(used, b->bytes);
  devices.erase(b->id);
  simt::free_guarded(pointer);
  return true;
}

int device_of(const void* pointer) {
  const Lock lock(mutex());
  const simt::Buffer* const b = simt::buffer_at(pointer);
  return b ? devices[b->id] : -1;
}

size_t bytes_used() { return used; }
size_t bytes_in_all() { return kTotal; }

std::string copy(void* to, const void* from, size_t bytes) {
  const Lock lock(mutex());
  if (bytes == 0) return "";
  try {
    simt::Buffer *const there = buffer_of(to, bytes), *const here = buffer_of(from, bytes);
    memmove(to, from, bytes);
    if (there && here) {
      memmove(written(there, to), written(here, from), bytes);
    } else if (there) {
      memset(written(there, to), 1, bytes);
    }
    return "";
  } catch (const std::exception& error) {
    return std::string("a copy out of bounds: ") + error.what();
  }
}

std::string fill(void* pointer, int value, size_t bytes) {
  const Lock lock(mutex());
  if (bytes == 0) return "";
  try {
    simt::Buffer* const b = buffer_of(pointer, bytes);
    if (!b) return "a fill of memory that is not the device's";
    memset(pointer, value, bytes);
    memset(written(b, pointer), 1, bytes);
    return "";
  } catch (const std::exception& error) {
    return std::string("a fill out of bounds: ") + error.what();
  }
}

void mark_written(const void* pointer, size_t bytes) {
  const Lock lock(mutex());
  simt::Buffer* const b = simt::buffer_at(pointer);
  if (b) memset(written(b, pointer), 1, std::min(bytes, b->bytes - offset(*b, pointer)));
}

int launch(int device, const void* config, const void* function, void** arguments, std::string* report) {
  const Lock lock(mutex());
  settle();
  simt_reset();
  try {
    load();
  } catch (const std::exception& error) {
    *report = error.what();
    return cudaErrorLaunchFailure;
  }
  std::map<simt::Buffer*, size_t> others;  // of other devices: nothing of them can be reached
  for (auto& [id, b] : simt::live_buffers()) {
    const auto at = devices.find(id);
    if (at != devices.end() && at->second != device) others[&b] = b.bytes, b.bytes = 0, b.sparse = true;
  }
  const cudaError_t code = machine_launch(static_cast<const cudaLaunchConfig_t*>(config), function, arguments);
  for (const auto& [b, bytes] : others) b->bytes = bytes, b->sparse = false;
  *report = simt_error();
  simt_reset();
  return code;
}

std::vector<std::vector<char>> copies_of_arguments(const void* function, void** arguments) {
  settle();
  load();
  std::vector<std::vector<char>> copies;
  for (const ptx::Param& p : ptx::kernel_of(function)->params) {
    const char* const from = static_cast<const char*>(arguments[copies.size()]);
    copies.emplace_back(from, from + p.size);
  }
  return copies;
}

void register_kernel(const void* function, const char* name) {
  machine_register_function(nullptr, static_cast<const char*>(function), nullptr, name, 0, nullptr, nullptr, nullptr,
                            nullptr, nullptr);
}

int set_attribute(const void* function, int attribute, int value) {
  const Lock lock(mutex());
  settle();
  return machine_set_attribute(function, static_cast<cudaFuncAttribute>(attribute), value);
}

int attribute(int* value, int which) {
  const Lock lock(mutex());
  settle();
  const cudaError_t error = cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(which), 0);
  cudaGetLastError();
  return error;
}

long figure(const char* key) {
  const Lock lock(mutex());
  settle();
  return simt_get(key);
}

int blocks_per_sm(int threads, size_t dynamic_bytes) {
  const Lock lock(mutex());
  settle();
  return simt::blocks_per_sm(threads, dynamic_bytes);
}

}  // namespace standin

// For tests: a figure of the model changes behind torch's back. 0 where there is none of that name.
extern "C" __attribute__((visibility("default"))) int standin_set(const char* key, long value) {
  const standin::Lock lock(standin::mutex());
  standin::settle();
  return simt_set(key, value);
}
