// The entries of libcudart.so.13 that do something: registration, launches, memory. Everything is done at the call.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "standin.h"

#define API extern "C" __attribute__((visibility("default")))

namespace standin {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_reason;

std::map<const void*, std::string>& kernels() {  // host function -> name; filled while libraries are loaded
  static auto* const all = new std::map<const void*, std::string>;
  return *all;
}

std::map<const void*, size_t>& pinned() {
  static auto* const all = new std::map<const void*, size_t>;
  return *all;
}

bool ours(const std::string& kernel) { return kernel.rfind("_ZN6bn_ext4cuda", 0) == 0; }

// A launch as a graph keeps it.
struct Kept {
  cudaLaunchConfig_t config;
  std::vector<cudaLaunchAttribute> attributes;
  const void* function;
  std::vector<std::vector<char>> arguments;
};

int run(const cudaLaunchConfig_t& config, const void* function, void** arguments, const std::string& name) {
  std::string report;
  const int error = launch(current_device(), &config, function, arguments, &report);
  if (const size_t end = report.find("}: "); report.rfind("{kernel ", 0) == 0 && end != std::string::npos) {
    report = name + ": " + report.substr(end + 3);
  }
  return error == cudaSuccess ? error : failed(error, report.empty() ? name + ": the launch is refused" : report);
}

int run_kept(const Kept& kept, const std::string& name) {
  std::vector<void*> arguments;
  for (const auto& a : kept.arguments) arguments.push_back(const_cast<char*>(a.data()));
  cudaLaunchConfig_t config = kept.config;
  config.attrs = const_cast<cudaLaunchAttribute*>(kept.attributes.data());
  return run(config, kept.function, arguments.data(), name);
}

cudaError_t launch_on_stream(const cudaLaunchConfig_t& config, const void* function, void** arguments) {
  const Lock lock(mutex());
  const auto at = kernels().find(function);
  if (at == kernels().end()) return cudaError_t(failed(cudaErrorInvalidDeviceFunction, "a function that is no kernel"));
  const std::string name = readable(at->second);
  if (!of_this_device(config.stream)) {
    return cudaError_t(failed(cudaErrorInvalidResourceHandle, name + ": a stream of another device"));
  }
  if (name.find("spin_kernel") != std::string::npos) return fall_asleep(config.stream), cudaSuccess;
  if (!ours(at->second)) return cudaError_t(failed(cudaErrorNotSupported, "no PTX of torch's own kernel " + name));
  auto kept = std::make_shared<Kept>();
  kept->config = config;
  kept->attributes.assign(config.attrs, config.attrs + config.numAttrs);
  kept->function = function;
  try {
    kept->arguments = copies_of_arguments(function, arguments);
  } catch (const std::exception& error) {
    return cudaError_t(failed(cudaErrorLaunchFailure, error.what()));
  }
  return cudaError_t(perform(config.stream, name, [kept, name] { return run_kept(*kept, name); }));
}

cudaError_t copy_on_stream(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  return cudaError_t(perform(stream, on_device(to) && on_device(from) ? "copy" : "transfer", [=] {
    const std::string wrong = copy(to, from, bytes);
    return wrong.empty() ? 0 : failed(cudaErrorInvalidValue, wrong);
  }));
}

cudaError_t fill_on_stream(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  return cudaError_t(perform(stream, "fill", [=] {
    const std::string wrong = fill(pointer, value, bytes);
    return wrong.empty() ? 0 : failed(cudaErrorInvalidValue, wrong);
  }));
}

cudaError_t allocated(void** pointer, size_t bytes) {
  *pointer = allocate(bytes, current_device());
  return *pointer ? cudaSuccess : cudaError_t(failed(cudaErrorMemoryAllocation, "out of memory"));
}

cudaError_t released(void* pointer) {
  if (!pointer || release(pointer)) return cudaSuccess;
  return cudaError_t(failed(cudaErrorInvalidValue, "a pointer is given back that no allocation has"));
}

thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;

}  // namespace

int failed(int error, const std::string& why) {
  last_error = static_cast<cudaError_t>(error);
  last_reason = why;
  return error;
}

bool is_pinned(const void* pointer) {
  const Lock lock(mutex());
  auto after = pinned().upper_bound(pointer);
  if (after == pinned().begin()) return false;
  const auto& [begin, bytes] = *--after;
  return pointer < static_cast<const char*>(begin) + bytes;
}

int perform(void* stream, const std::string& name, Step step) {
  const Lock lock(mutex());
  if (recorded(stream, step)) return cudaSuccess;
  log(name, stream);
  return step();
}

}  // namespace standin

using namespace standin;

// ---- registration and launches ----

API void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                                int*) {
  const Lock lock(mutex());
  kernels()[host] = name;
  if (ours(name)) register_kernel(host, name);
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch_on_stream(*config, function, arguments);
}
API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                 cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  return launch_on_stream(config, function, arguments);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const int error = set_attribute(function, attribute, value);
  return cudaError_t(error == cudaSuccess ? error : failed(error, "a kernel's attribute is refused"));
}

// ---- memory ----

API cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocated(pointer, bytes); }
API cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return allocated(pointer, bytes); }
API cudaError_t cudaFree(void* pointer) { return released(pointer); }
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return released(pointer); }
API cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  const Lock lock(mutex());
  return pinned()[pointer] = bytes, cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*pointer) cudaHostRegister(*pointer, bytes, 0);
  return *pointer ? cudaSuccess : cudaError_t(failed(cudaErrorMemoryAllocation, "out of memory of the host"));
}
API cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
API cudaError_t cudaHostUnregister(void* pointer) {
  const Lock lock(mutex());
  return pinned().erase(pointer), cudaSuccess;
}
API cudaError_t cudaFreeHost(void* pointer) { return cudaHostUnregister(pointer), free(pointer), cudaSuccess; }
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  wake(nullptr);
  return copy_on_stream(to, from, bytes, nullptr);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (!on_device(to) && !is_pinned(to)) wake(stream);  // such a copy waits
  return copy_on_stream(to, from, bytes, stream);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy_on_stream(to, from, bytes, stream);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t k = 0; k < height; ++k) {
    const char* const row = static_cast<const char*>(from) + k * from_pitch;
    const cudaError_t error = copy_on_stream(static_cast<char*>(to) + k * to_pitch, row, width, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return fill_on_stream(pointer, value, bytes, nullptr);
}
API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  return fill_on_stream(pointer, value, bytes, stream);
}

// ---- errors ----

API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
API const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char text[32];
  return snprintf(text, sizeof text, "cudaError %d", static_cast<int>(error)), text;
}
API const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorNotReady) return "not ready";
  return last_reason.empty() ? "an error of the stand-in" : last_reason.c_str();
}
// Of entries that the stand-in has not: build.py makes one of each name.
API int standin_refused(const char* name) {
  return failed(cudaErrorNotSupported, std::string("the stand-in has no ") + name);
}
// By the overlay: bytes that torch's operators have written; and an operator that a GPU would have launched.
API void standin_mark(const void* pointer, size_t bytes) { mark_written(pointer, bytes); }
API void standin_ran(const char* name, void* stream) { log(name, stream); }
API int standin_recorded(void* stream, void (*step)(void*), void (*drop)(void*), void* data) {
  const std::shared_ptr<void> kept(data, drop);
  return recorded(stream, [=] { return step(kept.get()), 0; });
}
