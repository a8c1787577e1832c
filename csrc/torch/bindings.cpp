// The Python module bn_ext._C. Loading it registers the operators of ops.cpp; what it offers itself is information.
// It needs pybind11 alone, which torch ships, so none of torch's heavy headers is read here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/architectures.h"
#include "cuda/plan.h"

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>

#include "cuda/launch.h"
#endif

namespace bn_ext {
const char* isa_level();           // cpu_ops.cpp: the level of the CPU kernels that this process uses
int& recomputations();             // calls.cpp
void add_entry(PyObject* module);  // entry.cpp
}  // namespace bn_ext

namespace {

namespace py = pybind11;
using bn_ext::Device;
using bn_ext::DType;
using bn_ext::Plan;
using bn_ext::TensorRef;
using bn_ext::VectorRef;

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
  info["cuda_codes"] = bn_ext::built_codes();
#ifdef WITH_CUDA
  info["cuda"] = CUDART_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["isa_level"] = bn_ext::isa_level();
  return info;
}

// Offset and strides of (n, c, l), all in elements, as Python passes an operand.
using View = std::array<int64_t, 4>;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("no such dtype: " + name);
}

// A plan reads addresses for their alignment and for being there, and follows none: these are made up.
void* address(int place, int64_t bytes = 0) {
  return reinterpret_cast<void*>((static_cast<uintptr_t>(place) << 40) + static_cast<uintptr_t>(bytes));
}

Plan make_plan(const std::string& pass, DType dtype, const std::array<int64_t, 3>& sizes,
               const std::vector<View>& views, const std::array<bool, 3>& gradients, const Device& device) {
  for (const int64_t size : sizes) {
    if (size < 1) throw std::invalid_argument("a plan is made for at least one element");
  }
  const bool training = pass == "forward" || pass == "backward";
  const bool backward = pass == "backward" || pass == "inference_backward";
  if (!training && !backward && pass != "inference") throw std::invalid_argument("no such pass: " + pass);
  if (views.size() != (backward ? 2u + gradients[0] : 2u)) {
    throw std::invalid_argument("operands: input, output; backward: grad_output, input and, if wanted, grad_input");
  }
  const bn_ext::Shape shape{sizes[0], sizes[1], sizes[2]};
  const int64_t width = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  const auto tensor = [&](size_t k) {
    const View& v = views[k];
    return TensorRef{address(static_cast<int>(k) + 1, v[0] * width), v[1], v[2], v[3]};
  };
  int place = bn_ext::kMaxPlanOperands;
  const auto vector = [&](bool given) {
    return given ? VectorRef{address(++place), accumulate_type(dtype), 1} : VectorRef{};
  };
  if (!backward) {
    bn_ext::ForwardArgs args{shape, dtype, tensor(0), tensor(1)};
    for (VectorRef* v : {&args.weight, &args.bias, &args.running_mean, &args.running_var}) *v = vector(true);
    args.training = training;
    args.saved = training ? address(++place) : nullptr;
    return plan_forward(args, device);
  }
  bn_ext::BackwardArgs args{shape, dtype, tensor(0), tensor(1)};
  if (gradients[0]) args.dx = tensor(2);
  args.weight = vector(true);
  args.grad_weight = vector(gradients[1]);
  args.grad_bias = vector(gradients[2]);
  args.saved = address(++place);
  args.training = training;
  return plan_backward(args, device);
}

py::dict launch_plan(const std::string& pass, const std::string& dtype, const std::array<int64_t, 3>& shape,
                     const std::vector<View>& operands, const std::array<bool, 3>& gradients, int capability, int sms,
                     int64_t shared_per_block, int64_t shared_per_sm, int64_t reserved_per_block, bool cooperative) {
  if (sms < 1) throw std::invalid_argument("a device has at least one SM");
  const Device device{capability, sms, shared_per_block, shared_per_sm, reserved_per_block, cooperative};
  const Plan plan = make_plan(pass, dtype_named(dtype), shape, operands, gradients, device);
  static constexpr const char* kExchanges[] = {"none", "cluster", "grid", "two launches"};
  py::dict found;
  found["exchange"] = kExchanges[static_cast<int>(plan.exchange)];
  found["launches"] = plan.launches;
  found["blocks"] = plan.blocks();
  found["threads"] = bn_ext::kThreads;
  found["tiles"] = plan.tiles;
  found["splits"] = plan.splits;
  found["tx"] = plan.tx;
  found["ty"] = plan.ty;
  found["vector"] = plan.vector;
  found["tile_channels"] = plan.tile_channels;
  found["planes"] = plan.planes;
  found["span"] = plan.span;
  found["modulo"] = plan.modulo;
  found["tail"] = plan.tail;
  found["channels"] = plan.channels;
  found["vectors"] = plan.vectors;
  found["rows"] = plan.rows;
  found["split_rows"] = plan.split_rows;
  found["kept"] = plan.kept;
  found["pooled"] = plan.pooled;
  found["stream_output"] = plan.stream_output;
  found["shared_bytes"] = plan.shared_bytes;
  found["workspace_bytes"] = plan.workspace_bytes;
  found["read_bytes"] = plan.read_bytes;
  found["write_bytes"] = plan.write_bytes;
  found["waste"] = plan.waste;
  found["busiest"] = plan.busiest;
  found["lone"] = plan.lone;
  found["meeting"] = plan.meeting;
  return found;
}

#ifdef WITH_CUDA
py::dict query_device(int index) {
  Device device;
  const cudaError_t error = bn_ext::cuda::query_device(index, &device);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // or torch would raise it at its next launch
    throw std::runtime_error(cudaGetErrorString(error));
  }
  py::dict figures;
  figures["capability"] = device.capability;
  figures["sms"] = device.sms;
  figures["shared_per_block"] = device.shared_per_block;
  figures["shared_per_sm"] = device.shared_per_sm;
  figures["reserved_per_block"] = device.reserved_per_block;
  figures["cooperative"] = device.cooperative;
  return figures;
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of bn_ext.";
  bn_ext::add_entry(m.ptr());
  m.def("build_info", &build_info,
        "What the library was compiled with: torch, cplusplus, compiler, openmp and cuda (version numbers or None), "
        "and the ISA level that it uses in this process.");
  m.def("isa_level", &bn_ext::isa_level, "ISA level of the CPU kernels in use: \"default\", \"avx2\" or \"avx512\".");
  m.def(
      "enter_recomputation", [] { ++bn_ext::recomputations(); },
      "From here on training moves no running statistics in this thread.");
  m.def("leave_recomputation", [] { --bn_ext::recomputations(); }, "Undo an enter_recomputation.");
  m.def("recomputes", [] { return bn_ext::recomputations() > 0; }, "Whether training moves none in this thread.");
  m.def("runs_on", &bn_ext::runs_on,
        "Whether code that nvcc built for these codes (\"sm_90,compute_90\") runs on a device of this capability, "
        "10 * major + minor.",
        py::arg("codes"), py::arg("capability"));
  m.def("launch_plan", &launch_plan,
        "How a call would be launched on a device with these figures, without making it: the fields of "
        "csrc/cuda/plan.h's "
        "Plan. pass is forward, inference, backward or inference_backward; shape is (n, c, l); operands are (offset, "
        "stride n, c, l) in elements of input, output or grad_output, input, grad_input; gradients is the output "
        "mask. Raises ValueError.",
        py::arg("pass_"), py::arg("dtype"), py::arg("shape"), py::arg("operands"), py::kw_only(),
        py::arg("gradients") = std::array<bool, 3>{true, true, true}, py::arg("capability"), py::arg("sms"),
        py::arg("shared_per_block"), py::arg("shared_per_sm"), py::arg("reserved_per_block"), py::arg("cooperative"));
#ifdef WITH_CUDA
  m.def("query_device", &query_device, "The figures of a CUDA device that launch_plan takes. Raises RuntimeError.",
        py::arg("index"));
#endif
}
