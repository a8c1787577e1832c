// What nvcc's host objects call of the CUDA runtime, and what tests call beside the functions of tests/simt. A launch
// takes the kernel that the host object registered for the function, its parameters by the sizes that the PTX declares.
#include <algorithm>
#include <stdexcept>

#include "machine.h"

namespace ptx {
namespace {

std::map<const void*, std::string>& names() {  // host function -> kernel; filled by other files' constructors
  static std::map<const void*, std::string> all;
  return all;
}
std::map<int, std::vector<Module*>> modules;  // by where tests put them
int chosen = 0, architecture = 0;
bool contracts = false;
uint64_t seed = 0;

}  // namespace

Kernel* kernel_of(const void* function) {
  const auto at = names().find(function);
  if (at == names().end()) fail("a launch of a function that nobody registered");
  for (const int place : {chosen, architecture}) {
    for (Module* m : modules[place]) {
      if (Kernel* k = find_kernel(m, at->second, contracts)) return k;
    }
  }
  fail("sm_" + std::to_string(architecture) + " has no PTX of " + at->second);
}

namespace {

// The two words of cooperative groups' barrier, as a buffer that is not counted.
simt::Buffer* grid_words() {
  static char* const words = static_cast<char*>(simt::allocate_guarded("the grid's barrier", 16, 256, false, false));
  simt::Buffer* const b = simt::buffer_at(words);
  b->internal = b->filled = true;
  return b;
}

// What CUDA would refuse beside what the device model does (device_model.cpp), by what the PTX says of the kernel.
void check_kernel(const Launch& l, const cudaLaunchConfig_t& config) {
  const Kernel& k = *l.kernel;
  if (config.gridDim.z != 1 || config.blockDim.y != 1 || config.blockDim.z != 1) fail("only grids in x and y");
  if (l.threads > k.max_threads) fail("more threads than .maxntid");
  if (l.threads % 32) fail("a launch of incomplete warps");
  if (l.cluster > 1 && architecture < 90) fail("a cluster by PTX of sm_" + std::to_string(architecture));
  const int64_t shared = k.dynamic_base - kSharedBase + l.dynamic_shared, of = simt::device().shared_per_block;
  if (shared > of) fail("more shared memory than a block may have: " + std::to_string(shared));
  const int64_t rounded = (shared + (simt::device().cc_major >= 8 ? 1024 : 0) + 127) / 128 * 128;
  const int64_t fit = std::min<int64_t>(simt::device().shared_per_sm / rounded, k.least_blocks) * simt::device().sms;
  if (l.cooperative && l.grid > fit) {
    fail("a cooperative launch of " + std::to_string(l.grid) + " blocks, of which " + std::to_string(fit) +
         " are sure to fit");
  }
}

void check_attributes(const cudaLaunchConfig_t& config) {
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    const auto id = config.attrs[a].id;
    if (id != cudaLaunchAttributeClusterDimension && id != cudaLaunchAttributeCooperative) {
      fail("a launch attribute that is not supported: " + std::to_string(id));
    }
  }
}

void fill_launch(Launch* l, const cudaLaunchConfig_t& config, const void* function, void** arguments) {
  l->kernel = kernel_of(function);
  l->grid_x = config.gridDim.x;
  l->grid = config.gridDim.x * config.gridDim.y;
  l->threads = config.blockDim.x;
  l->dynamic_shared = static_cast<uint32_t>(config.dynamicSmemBytes);
  check_attributes(config);
  check_kernel(*l, config);
  l->params.assign(l->kernel->param_bytes, simt::kPoison);
  for (size_t p = 0; p < l->kernel->params.size(); ++p) {
    memcpy(l->params.data() + l->kernel->params[p].offset, arguments[p], l->kernel->params[p].size);
  }
  if (l->cooperative) {
    simt::Buffer* const b = grid_words();
    memset(b->begin, 0, b->bytes);
    l->grid_word = reinterpret_cast<uint64_t>(b->begin);
  }
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, void** arguments) {
  simt::Launch record;
  const cudaError_t refused = simt::check_launch(config, function, &record.cluster, &record.cooperative);
  if (refused != cudaSuccess) return simt::remember(refused);
  record.kernel = function;
  record.grid = config.gridDim;
  record.block = config.blockDim;
  record.dynamic_shared = config.dynamicSmemBytes;
  record.blocks_per_sm = simt::blocks_per_sm(static_cast<int>(config.blockDim.x), config.dynamicSmemBytes);
  simt::begin_launch(record);
  Launch l;
  l.cluster = record.cluster;
  l.cooperative = record.cooperative;
  std::string error;
  try {
    fill_launch(&l, config, function, arguments);
    begin_counts(*l.kernel);
    run_launch(l, seed++);
    end_counts(*l.kernel, l.threads);
  } catch (const std::exception& e) {
    error = e.what();
  }
  simt::launch_record().grid_barriers = l.cooperative ? l.grid_arrivals / l.grid : 0;
  simt::end_launch();
  if (error.empty() && !simt::first_overwritten().empty()) {
    error = "memory beside " + simt::first_overwritten() + " was overwritten";
  }
  if (error.empty()) return cudaSuccess;
  char name[40];
  snprintf(name, sizeof(name), "{kernel %p}: ", function);
  simt::set_error(name + error);
  return simt::remember(cudaErrorLaunchFailure);
}

}  // namespace
}  // namespace ptx

#define API extern "C" __attribute__((visibility("default")))

// ---- the runtime, for nvcc's objects ----
API void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                                int*) {
  ptx::names()[host] = name;
}
// Of launches by <<<>>>, which the sources do not contain.
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
API int __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
API int __cudaGetKernel(void*, const void*) { return cudaErrorNotSupported; }
API int __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return ptx::launch(*config, function, arguments);
}
API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return simt::set_function_attribute(function, attribute, value);
}

// ---- for tests ----
API void simt_seed(uint64_t seed) { ptx::seed = seed; }
// Put a file of PTX, of an architecture or of a test's own number; 0 and an error where it cannot be read.
API int ptx_load(int place, const char* path) {
  try {
    ptx::modules[place].push_back(ptx::load_module(path));
    return 1;
  } catch (const std::exception& e) {
    simt::set_error(e.what());
    return 0;
  }
}
// Where launches look for their kernels: there, then with the architecture's. contract: with products and sums fused
// where ptxas may.
API void ptx_choose(int place, int architecture, int contract) {
  ptx::chosen = place, ptx::architecture = architecture, ptx::contracts = contract != 0;
}
// Decode all kernels of a place: how many instructions they have, or -1 with an error.
API long ptx_decode(int place) {
  long sum = 0;
  try {
    for (ptx::Module* m : ptx::modules[place]) {
      for (const std::string& name : ptx::entries_of(m)) {
        sum += static_cast<long>(ptx::find_kernel(m, name, false)->code.size());
        ptx::forget_kernels(m);  // all at once take a gigabyte
      }
    }
    return sum;
  } catch (const std::exception& e) {
    simt::set_error(e.what());
    return -1;
  }
}
// Launch a kernel by its name, without a host function.
API int ptx_launch(const char* kernel, unsigned grid, unsigned threads, unsigned cluster, int cooperative,
                   void** arguments) {
  static std::map<std::string, char> functions;
  const void* const function = &functions[kernel];
  ptx::names()[function] = kernel;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.attrs = attributes;
  config.numAttrs = 2;
  return ptx::launch(config, function, arguments);
}
