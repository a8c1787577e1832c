// torch's own operators on "cuda" tensors without its kernels: device memory is the host's here, so that each operator
// with a kernel for CUDA runs the CPU's, on aliases of its tensors. Loaded by site/sitecustomize.py.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <memory>
#include <set>

extern "C" {
void standin_mark(const void* pointer, size_t bytes);
void standin_ran(const char* name, void* stream);
int standin_recorded(void* stream, void (*step)(void*), void (*drop)(void*), void* data);
}

namespace {

using c10::IValue;
using Tensors = std::vector<at::Tensor>;
const c10::DispatchKeySet kHost(c10::DispatchKey::CPU);

size_t extent(const at::Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size());
}

void each_tensor(const IValue& v, const std::function<void(const at::Tensor&)>& call) {
  if (v.isTensor()) {
    call(v.toTensor());
  } else if (v.isTensorList()) {
    for (const at::Tensor& t : v.toTensorVector()) call(t);
  }
}

void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }  // of the device that a Guard has chosen

bool capturing() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream()), &status));
  return status == cudaStreamCaptureStatusActive;
}

// The device of a call's tensors, or the one that it names.
void look_for_device(const IValue& v, c10::cuda::OptionalCUDAGuard* guard) {
  if (guard->current_device()) return;
  if (v.isDevice() && v.toDevice().is_cuda()) guard->set_device(v.toDevice());
  each_tensor(v, [&](const at::Tensor& t) {
    if (t.defined() && t.is_cuda() && !guard->current_device()) guard->set_device(t.device());
  });
}

// Tensors of the host that lie where those of the device do. They own nothing.
struct Aliases {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // device, host
  std::set<const c10::TensorImpl*> empty;                // written, of no size: the operator may resize them

  at::Tensor of(const at::Tensor& t, bool written) {
    if (!t.defined() || !t.is_cuda()) return t;
    const auto options = t.options().device(at::kCPU);
    at::Tensor host;
    if (t.numel() == 0) {
      host = at::empty_strided(t.sizes(), t.strides(), options);
      if (written) empty.insert(host.unsafeGetTensorImpl());
    } else {
      host = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), options);
    }
    if (t.is_conj()) host._set_conj(true);
    if (t.is_neg()) host._set_neg(true);
    pairs.emplace_back(t, host);
    return host;
  }

  at::Tensor device_of(const at::Tensor& host) const {
    for (const auto& [device, h] : pairs) {
      if (h.is_same(host)) return device;
    }
    return {};
  }
};

void transfer(void* device, const at::Tensor& host) {
  if (host.numel() > 0) {
    memcpy(device, host.const_data_ptr(), extent(host));
    standin_mark(device, extent(host));
  }
}

bool holds_tensors(const IValue& v) { return v.isList() && v.type()->str().find("Tensor") != std::string::npos; }

IValue to_host(Aliases* aliases, const IValue& v, bool written) {
  if (v.isTensor()) return aliases->of(v.toTensor(), written);
  if (v.isTensorList()) {
    Tensors list;
    for (const at::Tensor& t : v.toTensorVector()) list.push_back(aliases->of(t, written));
    return list;
  }
  if (holds_tensors(v) && !v.toListRef().empty()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const IValue& e : v.toListRef()) {
      list.push_back(e.isTensor() ? std::optional(aliases->of(e.toTensor(), written)) : std::nullopt);
    }
    return list;
  }
  if (v.isDevice() && v.toDevice().is_cuda()) return c10::Device(at::kCPU);
  if (!v.isGenerator()) return v;
  TORCH_CHECK(v.toGenerator().device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
  return IValue();
}

// One call of an operator, as the host sees it.
struct Call {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;
  Aliases aliases;
  std::vector<std::pair<void*, size_t>> written;  // device memory that the operator changes in place
  std::vector<void*> made;                        // device memory of its results, in order; nullptr: of an argument

  explicit Call(const c10::OperatorHandle& handle) : op(handle) {}

  std::vector<IValue> run() const {
    torch::jit::Stack stack(arguments.begin(), arguments.end());
    op.redispatchBoxed(kHost, &stack);
    for (const auto& [pointer, bytes] : written) standin_mark(pointer, bytes);
    return {stack.begin(), stack.end()};
  }

  at::Tensor to_device(const at::Tensor& host) {
    if (!host.defined() || !host.is_cpu()) return host;
    at::Tensor device = aliases.device_of(host);
    made.push_back(nullptr);
    if (!device.defined()) {
      device = at::empty_strided(host.sizes(), host.strides(),
                                 host.options().device(at::kCUDA, c10::cuda::current_device()));
      if (host.numel() > 0) transfer(made.back() = device.mutable_data_ptr(), host);
    } else if (aliases.empty.count(host.unsafeGetTensorImpl()) && host.numel() > 0) {
      device.resize_(host.sizes());
      transfer(made.back() = device.mutable_data_ptr(), host.contiguous());
    }
    return device;
  }

  IValue to_device(const IValue& v) {
    if (v.isTensor()) return to_device(v.toTensor());
    if (!v.isTensorList()) return v;
    Tensors list;
    for (const at::Tensor& t : v.toTensorVector()) list.push_back(to_device(t));
    return list;
  }

  // In a graph: the results go where they went when it was captured.
  void again() const {
    size_t k = 0;
    for (const IValue& v : run()) {
      each_tensor(v, [&](const at::Tensor& t) {
        if (!t.defined() || !t.is_cpu()) return;
        if (void* const to = made.at(k++)) transfer(to, t);
      });
    }
  }
};

// While a stream is captured nothing is changed: the operator runs for the shapes of its results, and once a replay.
std::vector<IValue> run_for_shapes(const Call& call) {
  std::vector<std::string> before;
  for (const auto& [pointer, bytes] : call.written) before.emplace_back(static_cast<const char*>(pointer), bytes);
  auto results = call.run();
  for (size_t k = 0; k < before.size(); ++k) memcpy(call.written[k].first, before[k].data(), before[k].size());
  return results;
}

void keep_for_graph(std::shared_ptr<Call> call) {
  call->aliases.pairs
      .clear();  // the graph's memory stays its own; tensors held here would keep it from being used again
  standin_recorded(
      stream(), [](void* p) { (*static_cast<std::shared_ptr<Call>*>(p))->again(); },
      [](void* p) { delete static_cast<std::shared_ptr<Call>*>(p); }, new std::shared_ptr<Call>(std::move(call)));
}

// As torch's kernels for CUDA do, where the CPU's would take memory of another device.
void check_devices(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  if (schema.name().find("batch_norm") == std::string::npos) return;
  const at::Device on(at::kCUDA, c10::cuda::current_device());
  for (size_t k = 0; k < arguments.size(); ++k) {
    each_tensor(arguments[k], [&](const at::Tensor& t) {
      TORCH_CHECK(!t.defined() || t.device() == on, "Expected all tensors to be on the same device, but got ",
                  schema.arguments()[k].name(), " is on ", t.device(), ", different from other tensors on ", on,
                  " (when checking argument in method wrapper_CUDA_", schema.name(), ")");
    });
  }
}

void on_the_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const auto call = std::make_shared<Call>(op);
  bool works = false;
  c10::cuda::OptionalCUDAGuard guard;
  for (size_t k = 0; k < count; ++k) look_for_device((*stack)[first + k], &guard);
  check_devices(schema, {stack->end() - static_cast<std::ptrdiff_t>(count), stack->end()});
  for (size_t k = 0; k < count; ++k) {
    const IValue& v = (*stack)[first + k];
    const auto* alias = schema.arguments()[k].alias_info();
    const bool writes = alias && alias->isWrite();
    each_tensor(v, [&](const at::Tensor& t) {
      if (!t.defined() || !t.is_cuda() || t.numel() == 0) return;
      works = true;
      if (writes) call->written.emplace_back(const_cast<void*>(t.const_data_ptr()), extent(t));
    });
    call->arguments.push_back(to_host(&call->aliases, v, writes));
  }
  stack->resize(first);
  const std::string name = schema.name();
  if (name == "aten::_local_scalar_dense") c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream());
  const bool kept = capturing();
  if (works && !kept) standin_ran(name.c_str(), ::stream());
  const bool packs = name == "aten::_pack_padded_sequence";  // whose second result lies on the host, as on a GPU
  for (const IValue& v : kept ? run_for_shapes(*call) : call->run()) {
    stack->push_back(packs && stack->size() > first ? v : call->to_device(v));
  }
  if (kept) keep_for_graph(call);
}

// copy_ has one kernel for all devices, which would come back here.
void copy(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const bool non_blocking = stack->back().toBool();
  const at::Tensor source = (*stack)[stack->size() - 2].toTensor(), self = (*stack)[stack->size() - 3].toTensor();
  const c10::cuda::CUDAGuard guard(self.is_cuda() ? self.device() : source.device());
  if (!self.is_cuda() && !non_blocking) c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream());
  stack->resize(stack->size() - 2);
  if (self.numel() == 0) return;
  Aliases aliases;
  const at::Tensor to = aliases.of(self, true), from = aliases.of(source, false);
  void* const marked = self.is_cuda() ? const_cast<void*>(self.const_data_ptr()) : nullptr;
  const auto step = [=] {
    to.copy_(from);
    if (marked) standin_mark(marked, extent(to));
  };
  if (!capturing()) {
    standin_ran(self.is_cuda() && source.is_cuda() ? "aten::copy_" : "transfer", ::stream());
    return step();
  }
  using Step = std::function<void()>;
  standin_recorded(
      ::stream(), [](void* p) { (*static_cast<Step*>(p))(); }, [](void* p) { delete static_cast<Step*>(p); },
      new Step(step));
}

// Kept as they are: what makes, views or moves storage.
bool kept(const std::string& name) {
  static const std::set<std::string> names{"empty",
                                           "empty_strided",
                                           "as_strided",
                                           "view",
                                           "_reshape_alias",
                                           "set_",
                                           "resize_",
                                           "resize_as_",
                                           "unfold",
                                           "_resize_output_",
                                           "as_strided_",
                                           "squeeze_",
                                           "unsqueeze_",
                                           "transpose_",
                                           "t_",
                                           "swapaxes_",
                                           "swapdims_",
                                           "detach_",
                                           "is_set_to",
                                           "record_stream",
                                           "view_as_complex",
                                           "view_as_real",
                                           "is_pinned",
                                           "alias",
                                           "_pin_memory",
                                           "_efficientzerotensor",
                                           "_nested_view_from_buffer"};
  return names.count(name.substr(name.find("::") + 2)) > 0;
}

// Of the operators with one kernel for all devices: neither views nor what goes from a device to another.
bool computes(const c10::FunctionSchema& schema) {
  bool tensors = false;
  for (const c10::Argument& a : schema.arguments()) {
    if (a.name() == "device" || a.name() == "pin_memory") return false;
    tensors |= a.type()->str().find("Tensor") != std::string::npos;
  }
  for (const c10::Argument& r : schema.returns()) {
    if (r.alias_info() && !r.alias_info()->isWrite()) return false;
  }
  return tensors;
}

bool replaced(const c10::OperatorName& name, const c10::OperatorHandle& op) {
  using Key = c10::DispatchKey;
  if (name.name.rfind("aten::", 0) != 0 || kept(name.name)) return false;
  const auto has = [&](Key key) { return op.hasKernelForDispatchKey(key); };
  if (has(Key::CompositeExplicitAutograd) || has(Key::CompositeExplicitAutogradNonFunctional)) {
    return has(Key::CUDA) || computes(op.schema());
  }
  return has(Key::CUDA) && (has(Key::CPU) || has(Key::CompositeImplicitAutograd));
}

struct Install {
  Install() {
    static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
      const auto op = c10::Dispatcher::singleton().findSchema(name);
      if (!op) continue;
      const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      if (name.name == "aten::copy_") {
        library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&copy>());
      } else if (replaced(name, *op)) {
        library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
      }
    }
  }
} install;

}  // namespace
