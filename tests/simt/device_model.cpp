// The modelled device: what CUDA's queries answer, what a launch is refused for, how many blocks fit an SM.
// Figures: CUDA programming guide, "Compute capabilities" (limits per SM and block), and the products' data sheets.
#include <algorithm>
#include <cstring>
#include <map>

#include "records.h"

namespace simt {
namespace {

constexpr long K = 1024, M = 1024 * 1024;

// name, capability, SMs, shared memory an SM and a block, threads and blocks an SM, L2, SMs of a GPC
const Device kPresets[] = {
    {"T4", 7, 5, 40, 64 * K, 64 * K, 1024, 16, 4 * M, 8, 64, 0},
    {"A100", 8, 0, 108, 164 * K, 163 * K, 2048, 32, 40 * M, 16, 64, 0},
    {"RTX 3090", 8, 6, 82, 100 * K, 99 * K, 1536, 16, 6 * M, 12, 64, 0},
    {"RTX 4090", 8, 9, 128, 100 * K, 99 * K, 1536, 24, 72 * M, 12, 64, 0},
    {"H100", 9, 0, 132, 228 * K, 227 * K, 2048, 32, 50 * M, 16, 64, 0},
    {"H200", 9, 0, 132, 228 * K, 227 * K, 2048, 32, 60 * M, 16, 64, 0},
    {"B200", 10, 0, 148, 228 * K, 227 * K, 2048, 32, 126 * M, 16, 64, 0},
    {"RTX 5090", 12, 0, 170, 100 * K, 99 * K, 1536, 24, 96 * M, 16, 64, 0},
};

Device model = kPresets[5];
cudaError_t last_error = cudaSuccess;

struct Attributes {
  long dynamic_shared = 48 * K;
  bool large_clusters = false;
};
std::map<const void*, Attributes> attributes;

long* field(const char* key) {
  const std::pair<const char*, long*> fields[] = {
      {"cc_major", &model.cc_major},
      {"cc_minor", &model.cc_minor},
      {"sms", &model.sms},
      {"shared_per_sm", &model.shared_per_sm},
      {"shared_per_block", &model.shared_per_block},
      {"threads_per_sm", &model.threads_per_sm},
      {"blocks_per_sm", &model.blocks_per_sm},
      {"l2_bytes", &model.l2_bytes},
      {"cache_bytes", &model.cache_bytes},
      {"sms_per_gpc", &model.sms_per_gpc},
      {"registers", &model.registers},
      {"static_shared", &model.static_shared},
      {"cooperative", &model.cooperative},
  };
  for (const auto& [name, value] : fields) {
    if (strcmp(name, key) == 0) return value;
  }
  return nullptr;
}

long reserved_shared() { return model.cc_major >= 8 ? K : 0; }

uint64_t volume(dim3 v) { return uint64_t{v.x} * v.y * v.z; }

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& a = config.attrs[i];
    if (a.id != cudaLaunchAttributeClusterDimension) continue;
    return a.val.clusterDim.y == 1 && a.val.clusterDim.z == 1 ? a.val.clusterDim.x : 0;
  }
  return 1;
}

bool cluster_fits(unsigned cluster, const void* kernel) {
  const bool large = attributes[kernel].large_clusters;
  return cluster == 1 || (model.cc_major >= 9 && cluster >= 1 && cluster <= (large ? 16u : 8u));
}

}  // namespace

const Device& device() { return model; }

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int blocks_per_sm(int threads, size_t dynamic_bytes) {
  const long warps = (threads + 31) / 32;
  const long registers = std::min(model.registers, 65536L / (warps * 32) / 8 * 8);  // __launch_bounds__ sees to it
  const long warp_registers = (registers * 32 + 255) / 256 * 256;
  const long shared = (static_cast<long>(dynamic_bytes) + model.static_shared + reserved_shared() + 127) / 128 * 128;
  const long by_registers = 16384 / warp_registers * 4 / warps;
  const long by_shared = shared == 0 ? model.blocks_per_sm : model.shared_per_sm / shared;
  return static_cast<int>(
      std::min({model.blocks_per_sm, model.threads_per_sm / (warps * 32), by_registers, by_shared}));
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel, unsigned* cluster, bool* cooperative) {
  const uint64_t threads = volume(config.blockDim), blocks = volume(config.gridDim);
  if (threads == 0 || threads > 1024 || config.blockDim.z > 64 || blocks == 0) return cudaErrorInvalidConfiguration;
  if (config.gridDim.x > 0x7fffffffu || config.gridDim.y > 65535 || config.gridDim.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes + model.static_shared > static_cast<size_t>(attributes[kernel].dynamic_shared)) {
    return cudaErrorInvalidValue;
  }
  *cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) *cooperative = a.val.cooperative != 0;
  }
  if (*cooperative && model.cooperative == 0) return cudaErrorNotSupported;
  *cluster = cluster_of(config);
  if (!cluster_fits(*cluster, kernel) || config.gridDim.x % *cluster != 0) return cudaErrorInvalidValue;
  int fit = blocks_per_sm(static_cast<int>(threads), config.dynamicSmemBytes) * static_cast<int>(model.sms);
  if (fit == 0) return cudaErrorLaunchOutOfResources;
  if (*cluster > 1) {
    active_clusters(&fit, kernel, config);
    fit *= static_cast<int>(*cluster);
  }
  if (*cooperative && blocks > static_cast<uint64_t>(fit)) return cudaErrorCooperativeLaunchTooLarge;
  return fit == 0 ? cudaErrorLaunchOutOfResources : cudaSuccess;
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Attributes& a = attributes[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value + model.static_shared > model.shared_per_block) return remember(cudaErrorInvalidValue);
    a.dynamic_shared = std::max<long>(value + model.static_shared, 48 * K);
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) a.large_clusters = value != 0;
  return cudaSuccess;
}

cudaError_t get_function_attributes(cudaFuncAttributes* out, const void* kernel) {
  *out = cudaFuncAttributes{};
  out->sharedSizeBytes = static_cast<size_t>(model.static_shared);
  out->numRegs = static_cast<int>(model.registers);
  out->maxThreadsPerBlock = static_cast<int>(std::min(1024L, 65536 / model.registers / 32 * 32));
  out->maxDynamicSharedSizeBytes = static_cast<int>(attributes[kernel].dynamic_shared - model.static_shared);
  return cudaSuccess;
}

cudaError_t active_blocks(int* blocks, int threads, size_t dynamic_bytes) {
  *blocks = blocks_per_sm(threads, dynamic_bytes);
  return cudaSuccess;
}

// A cluster lies within one GPC; a GPC's SMs that are left over hold none.
cudaError_t active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  const unsigned cluster = cluster_of(config);
  if (!cluster_fits(cluster, kernel)) return remember(cudaErrorInvalidValue);
  const long blocks = blocks_per_sm(static_cast<int>(volume(config.blockDim)), config.dynamicSmemBytes);
  const long gpc = std::min(model.sms_per_gpc, model.sms);
  *clusters = static_cast<int>(model.sms / gpc * (gpc * blocks / cluster) + model.sms % gpc * blocks / cluster);
  return cudaSuccess;
}

}  // namespace simt

using simt::model;

cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int id) { return id == 0 ? cudaSuccess : simt::remember(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int id) {
  if (id != 0) return simt::remember(cudaErrorInvalidDevice);
  const auto answer = [&]() -> long {
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock:
        return 1024;
      case cudaDevAttrMaxGridDimX:
        return 0x7fffffff;
      case cudaDevAttrMaxGridDimY:
      case cudaDevAttrMaxGridDimZ:
        return 65535;
      case cudaDevAttrMaxSharedMemoryPerBlock:
        return 48 * 1024;
      case cudaDevAttrWarpSize:
        return 32;
      case cudaDevAttrMaxRegistersPerBlock:
      case cudaDevAttrMaxRegistersPerMultiprocessor:
        return 65536;
      case cudaDevAttrMultiProcessorCount:
        return model.sms;
      case cudaDevAttrL2CacheSize:
        return model.l2_bytes;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        return model.threads_per_sm;
      case cudaDevAttrComputeCapabilityMajor:
        return model.cc_major;
      case cudaDevAttrComputeCapabilityMinor:
        return model.cc_minor;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return model.shared_per_sm;
      case cudaDevAttrCooperativeLaunch:
        return model.cooperative;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return model.shared_per_block;
      case cudaDevAttrMaxBlocksPerMultiprocessor:
        return model.blocks_per_sm;
      case cudaDevAttrReservedSharedMemoryPerBlock:
        return simt::reserved_shared();
      case cudaDevAttrClusterLaunch:
        return model.cc_major >= 9;
    }
    return -1;
  }();
  if (answer < 0) return simt::remember(cudaErrorInvalidValue);
  *value = static_cast<int>(answer);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int id) {
  if (id != 0) return simt::remember(cudaErrorInvalidDevice);
  *p = cudaDeviceProp{};
  snprintf(p->name, sizeof(p->name), "%s (modelled)", model.name);
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = static_cast<size_t>(model.shared_per_block);
  p->sharedMemPerMultiprocessor = static_cast<size_t>(model.shared_per_sm);
  p->reservedSharedMemPerBlock = static_cast<size_t>(simt::reserved_shared());
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = static_cast<int>(model.threads_per_sm);
  p->maxBlocksPerMultiProcessor = static_cast<int>(model.blocks_per_sm);
  p->multiProcessorCount = static_cast<int>(model.sms);
  p->l2CacheSize = static_cast<int>(model.l2_bytes);
  p->major = static_cast<int>(model.cc_major);
  p->minor = static_cast<int>(model.cc_minor);
  p->cooperativeLaunch = static_cast<int>(model.cooperative);
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return simt::last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return simt::fill(pointer, value, bytes) ? cudaSuccess : simt::remember(cudaErrorInvalidValue);
}

// ---- what tests call ----
#define SIMT_API extern "C" __attribute__((visibility("default")))

// Take a preset's figures; 0 if there is none of that name. Function attributes are forgotten.
SIMT_API int simt_device(const char* name) {
  for (const auto& preset : simt::kPresets) {
    if (strcmp(preset.name, name) != 0) continue;
    model = preset;
    simt::attributes.clear();
    simt::last_error = cudaSuccess;
    return 1;
  }
  return 0;
}
// Change or read one figure of the model by its name in simt::Device; 0 and -1 where there is none of that name.
SIMT_API int simt_set(const char* key, long value) {
  long* const at = simt::field(key);
  if (at != nullptr) *at = value;
  return at != nullptr;
}
SIMT_API long simt_get(const char* key) {
  const long* const at = simt::field(key);
  return at != nullptr ? *at : -1;
}
