// The way in from Python for eager calls: bn_ext._C.batch_norm, which is torch.ops.bn_ext.batch_norm without a schema
// to match and a stack of values to fill, half of what that call costs. It goes through the dispatcher all the same.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "operators.h"

namespace bn_ext {
namespace {

// Arguments in the order of torch.nn.functional.batch_norm; every read returns whether it is plainly what it should be.
struct Arguments {
  static constexpr Py_ssize_t kCount = 16, kRequired = 9;
  PyObject* const* at;
  Py_ssize_t given;

  PyObject* optional(int i) const { return i < given ? at[i] : Py_None; }
  // Of a type that overrides no function: torch.Tensor or Parameter.
  bool tensor(int i, OptionalTensor* t) const {
    PyObject* const from = optional(i);
    if (from == Py_None) return true;
    if (!THPVariable_CheckExact(from)) return false;
    *t = THPVariable_Unpack(from);
    return true;
  }
  static bool number(PyObject* from, double* value) {
    if (PyFloat_CheckExact(from)) {
      *value = PyFloat_AS_DOUBLE(from);
      return true;
    }
    if (!PyLong_CheckExact(from)) return false;
    *value = PyLong_AsDouble(from);
    if (*value != -1 || !PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

// None where any argument is other than it is nearly always, or somebody records or watches the call: the operator then
// deals with it.
PyObject* batch_norm(PyObject*, PyObject* const* args, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  static const auto op = handle<schema::BatchNorm>("bn_ext::batch_norm");
  const Arguments a{args, given};
  OptionalTensor input, running_mean, running_var, weight, bias, count, residual, valid;
  double eps = 0, momentum = 0, slope = 0.01;
  if (given < Arguments::kRequired || given > Arguments::kCount) Py_RETURN_NONE;
  if (torch::jit::tracer::isTracing() || c10::impl::TorchDispatchModeTLS::any_modes_set()) Py_RETURN_NONE;
  if (!a.tensor(0, &input) || !input.has_value()) Py_RETURN_NONE;
  if (!a.tensor(1, &running_mean) || !a.tensor(2, &running_var) || !a.tensor(3, &weight) || !a.tensor(4, &bias) ||
      !a.tensor(5, &count) || !a.tensor(9, &residual) || !a.tensor(13, &valid)) {
    Py_RETURN_NONE;
  }
  const bool training = args[6] == Py_True, cumulative = args[7] == Py_None;
  if (!training && (args[6] != Py_False || !running_mean.has_value() || !running_var.has_value())) Py_RETURN_NONE;
  if (!(cumulative || Arguments::number(args[7], &momentum)) || !Arguments::number(args[8], &eps)) Py_RETURN_NONE;
  std::string_view activation = "identity";
  if (given > 10) {
    Py_ssize_t size = 0;
    const char* const name = PyUnicode_CheckExact(args[10]) ? PyUnicode_AsUTF8AndSize(args[10], &size) : nullptr;
    if (name == nullptr) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    activation = {name, static_cast<size_t>(size)};
  }
  if (given > 11 && !Arguments::number(args[11], &slope)) Py_RETURN_NONE;
  int64_t virtual_batch_size = 0;
  if (given > 12) {
    if (!PyLong_CheckExact(args[12])) Py_RETURN_NONE;
    virtual_batch_size = PyLong_AsLongLong(args[12]);
    if (virtual_batch_size == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  }
  if (given > 14 && args[14] != Py_False && args[14] != Py_True) Py_RETURN_NONE;
  const bool allow_single_value = given > 14 && args[14] == Py_True;
  std::array<double, 4> numbers{};
  OptionalNumbers renorm;
  if (given > 15 && args[15] != Py_None) {
    if (!PyTuple_CheckExact(args[15]) || PyTuple_GET_SIZE(args[15]) != Py_ssize_t{numbers.size()}) Py_RETURN_NONE;
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (!Arguments::number(PyTuple_GET_ITEM(args[15], static_cast<Py_ssize_t>(i)), &numbers[i])) Py_RETURN_NONE;
    }
    renorm = numbers;
  }
  Tensor output;
  {
    const pybind11::gil_scoped_release others_may_run;
    output = op.call(*input, weight, bias, running_mean, running_var, count, training,
                     cumulative ? std::nullopt : std::optional<double>(momentum), eps, residual, activation, slope,
                     virtual_batch_size, valid, allow_single_value, renorm);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"batch_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(batch_norm)), METH_FASTCALL,
     "batch_norm(input, running_mean, running_var, weight, bias, num_batches_tracked, training, momentum, eps,\n"
     "           residual=None, activation=\"identity\", negative_slope=0.01, virtual_batch_size=0,\n"
     "           valid=None, allow_single_value=False, renorm=None)\n\n"
     "torch.ops.bn_ext.batch_norm, faster; None, and nothing has changed, where an argument is unusual."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_entry(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw pybind11::error_already_set();
}

}  // namespace bn_ext
