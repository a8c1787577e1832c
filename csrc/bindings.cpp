// The Python module bn_ext._C. Loading it registers the operators of ops.cpp; what it offers itself is information.
// It needs pybind11 alone, which torch ships, so none of torch's heavy headers is read here.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace bn_ext {
const char* isa_level();  // ops.cpp: the level of the CPU kernels that this process uses
}  // namespace bn_ext

namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#ifdef WITH_CUDA
  info["cuda"] = CUDART_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["isa_level"] = bn_ext::isa_level();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of bn_ext.";
  m.def("build_info", &build_info,
        "What the library was compiled with: torch, cplusplus, compiler, openmp and cuda (version numbers or None), "
        "and the ISA level that it uses in this process.");
  m.def("isa_level", &bn_ext::isa_level, "ISA level of the CPU kernels in use: \"default\", \"avx2\" or \"avx512\".");
}
