// The stand-in's entry: compile a .cu with `g++ -x c++ -DBN_EXT_SIMT -I tests/simt/include`.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "simt/device.h"

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel parameters take at most 4 KB before Volta's successors");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel parameters are copied as bytes");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::remove_cv_t<Params>...> args;
  } call{kernel, {std::forward<Args>(args)...}};
  return simt::launch(
      *config, reinterpret_cast<const void*>(kernel),
      [](void* body) {
        const Call& c = *static_cast<Call*>(body);
        std::apply(c.kernel, c.args);
      },
      &call);
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  return simt::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F* kernel) {
  return simt::get_function_attributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int threads, size_t dynamic_bytes) {
  return simt::active_blocks(blocks, threads, dynamic_bytes);
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F* kernel, const cudaLaunchConfig_t* config) {
  return simt::active_clusters(clusters, reinterpret_cast<const void*>(kernel), *config);
}
