// What torch asks of the device, and what tests ask of the stand-in: the work since a moment, and its streams.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "standin.h"

#define API extern "C" __attribute__((visibility("default")))

namespace standin {
namespace {

constexpr int kVersion = 13000;
constexpr int kThreads = 1024, kThreadsPerSm = 2048, kRegisters = 65536;

const bool says = getenv("STANDIN_SAY") != nullptr;
thread_local int current = 0;
bool logging = false;
std::string logged;

// Attributes that the model has no figure for, and that torch asks for.
int other_attribute(int* value, cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return *value = kThreads, cudaSuccess;
    case cudaDevAttrMaxBlockDimZ:
      return *value = 64, cudaSuccess;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
      return *value = 1, cudaSuccess;
    case cudaDevAttrClockRate:
      return *value = 1980000, cudaSuccess;  // kHz: an H200's
    case cudaDevAttrTextureAlignment:
      return *value = 512, cudaSuccess;
    default:
      return failed(cudaErrorInvalidValue, "the stand-in has no device attribute " + std::to_string(attribute));
  }
}

bool is_device(int device) { return device >= 0 && device < kDevices; }

}  // namespace

int current_device() { return current; }

void log(const std::string& name, void* stream) {
  const Lock lock(mutex());
  char at[32];
  snprintf(at, sizeof at, "%p ", stream);
  if (says) fprintf(stderr, "[standin] %s%s\n", at, name.c_str());
  if (logging) logged += at + name + "\n";
}

std::string readable(const std::string& mangled) {
  int status = 0;
  char* const text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 ? text : mangled;
  free(text);
  return name;
}

}  // namespace standin

using namespace standin;

API cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return cudaError_t(failed(cudaErrorInvalidDevice, "invalid device ordinal"));
  return current = device, cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
  return snprintf(id, static_cast<size_t>(size), "0000:%02d:00.0", device + 1), cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = bytes_in_all() - bytes_used(), *total = bytes_in_all(), cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* answer, const void* pointer) {
  *answer = {};
  answer->device = device_of(pointer);
  const bool there = answer->device >= 0;
  answer->type = there ? cudaMemoryTypeDevice : is_pinned(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  answer->devicePointer = there ? const_cast<void*>(pointer) : nullptr;
  if (answer->type == cudaMemoryTypeHost) answer->device = 0, answer->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (!is_device(device)) return cudaError_t(failed(cudaErrorInvalidDevice, "invalid device ordinal"));
  const int error = attribute(value, which);
  return cudaError_t(error == cudaSuccess ? error : other_attribute(value, which));
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (!is_device(device)) return cudaError_t(failed(cudaErrorInvalidDevice, "invalid device ordinal"));
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "PTX on the CPU");
  p->totalGlobalMem = bytes_in_all();
  p->major = static_cast<int>(figure("cc_major")), p->minor = static_cast<int>(figure("cc_minor"));
  p->multiProcessorCount = static_cast<int>(figure("sms"));
  p->warpSize = 32, p->maxThreadsPerBlock = kThreads, p->maxThreadsPerMultiProcessor = kThreadsPerSm;
  p->maxBlocksPerMultiProcessor = static_cast<int>(figure("blocks_per_sm"));
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = kThreads, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 48 * 1024, p->reservedSharedMemPerBlock = 1024;
  p->sharedMemPerBlockOptin = static_cast<size_t>(figure("shared_per_block"));
  p->sharedMemPerMultiprocessor = static_cast<size_t>(figure("shared_per_sm"));
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->totalConstMem = 65536, p->textureAlignment = 512, p->l2CacheSize = static_cast<int>(figure("l2_bytes"));
  p->unifiedAddressing = 1, p->concurrentKernels = 1, p->cooperativeLaunch = static_cast<int>(figure("cooperative"));
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* answer, const void*) {
  *answer = {};
  answer->maxThreadsPerBlock = kThreads, answer->numRegs = static_cast<int>(figure("registers"));
  answer->binaryVersion = answer->ptxVersion = static_cast<int>(10 * figure("cc_major") + figure("cc_minor"));
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared) {
  return *blocks = blocks_per_sm(threads, shared), cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                       size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}
// Of the driver that build.py makes: each of its entries refuses.
API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *entry = dlsym(RTLD_DEFAULT, symbol);
  if (result) *result = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- for tests ----

API void standin_log_begin() {
  const Lock lock(mutex());
  logging = true, logged.clear();
}
// The work since standin_log_begin, a line each: stream and kernel, "copy", "transfer", "fill", or torch's operator.
API const char* standin_log_end() {
  static std::string told;
  const Lock lock(mutex());
  logging = false, told = std::move(logged), logged.clear();
  return told.c_str();
}
