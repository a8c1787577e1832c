// Runs one kernel of the AVX2 level a given number of times on warm memory, without torch: what
// tests/test_instructions.py counts the instructions of. Usage: driver KERNEL TIMES.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/level_avx2.cpp"

namespace {

using namespace bn_ext;

struct Case {
  const char* name;
  Shape shape;
  DType dtype;
  enum { kForward, kBackward, kDoubleBackward } pass;
  bool activated = false;  // by bn_ext::Activation, of x plus a residual where `residual`
  Activation activation = Activation::kIdentity;
  bool residual = false;
};

const Case kCases[] = {
    {"forward_columns_float32", {512, 256, 1}, DType::kFloat32, Case::kForward},
    {"forward_planes_float32", {16, 16, 512}, DType::kFloat32, Case::kForward},
    {"backward_columns_float32", {512, 256, 1}, DType::kFloat32, Case::kBackward},
    {"backward_planes_bfloat16", {16, 16, 512}, DType::kBFloat16, Case::kBackward},
    {"double_backward_columns_float32", {512, 256, 1}, DType::kFloat32, Case::kDoubleBackward},
    {"double_backward_planes_bfloat16", {16, 16, 512}, DType::kBFloat16, Case::kDoubleBackward},
    {"forward_relu_columns_float32", {512, 256, 1}, DType::kFloat32, Case::kForward, true, Activation::kReLU},
    {"forward_gelu_planes_float32", {16, 16, 512}, DType::kFloat32, Case::kForward, true, Activation::kGELU},
    {"forward_residual_relu_columns_bfloat16",
     {512, 256, 1},
     DType::kBFloat16,
     Case::kForward,
     true,
     Activation::kReLU,
     true},
    {"backward_relu_columns_float32", {512, 256, 1}, DType::kFloat32, Case::kBackward, true, Activation::kReLU},
    {"backward_silu_planes_float32", {16, 16, 512}, DType::kFloat32, Case::kBackward, true, Activation::kSiLU},
    {"backward_residual_relu_planes_bfloat16",
     {16, 16, 512},
     DType::kBFloat16,
     Case::kBackward,
     true,
     Activation::kReLU,
     true},
};

constexpr int kTensors = 5;

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  for (const Case& c : kCases) {
    if (std::strcmp(argv[1], c.name) != 0) continue;
    const cpu::Kernels* kernels = cpu::kernels_avx2();
    if (kernels == nullptr) return 3;
    const int64_t numel = c.shape.numel();
    // Values between -1 and 1 from a linear congruential generator; bfloat16 is a float's upper half.
    std::vector<float> wide(kTensors * numel), statistics(kSavedRows * c.shape.c);
    std::vector<uint16_t> narrow(kTensors * numel);
    std::vector<uint8_t> mask(mask_bytes(numel, kCpuMaskElements));
    uint32_t state = 1;
    for (int64_t i = 0; i < kTensors * numel; ++i) {
      state = state * 1664525u + 1013904223u;
      wide[i] = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
      uint32_t bits;
      std::memcpy(&bits, &wide[i], 4);
      narrow[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (int64_t i = 0; i < c.shape.c; ++i) {
      statistics[2 * c.shape.c + i] = 1.7f;
      statistics[4 * c.shape.c + i] = 1.7f;
    }
    const auto tensor = [&](int k) {
      void* data = c.dtype == DType::kFloat32 ? static_cast<void*>(wide.data() + k * numel) : narrow.data() + k * numel;
      return TensorRef{data, c.shape.c * c.shape.l, c.shape.l, c.shape.l > 1 ? 1 : 0};
    };
    const Parallel one_thread = {1, [](int64_t tasks, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
                                   body(context, 0, tasks);
                                 }};
    std::vector<float> grad_weight(c.shape.c), grad_bias(c.shape.c);
    for (int i = 0; i < std::atoi(argv[2]); ++i) {
      Epilogue epilogue;
      epilogue.activation = c.activation;
      if (c.residual) epilogue.residual = tensor(3), epilogue.mask = mask.data();
      const auto set_backward = [&](BackwardArgs& a) {
        a.shape = c.shape;
        a.dtype = c.dtype;
        a.dy = tensor(0);
        a.x = tensor(1);
        a.dx = tensor(2);
        a.grad_weight = {grad_weight.data(), DType::kFloat32, 1};
        a.grad_bias = {grad_bias.data(), DType::kFloat32, 1};
        a.saved = statistics.data();
      };
      if (c.pass == Case::kDoubleBackward) {
        DoubleBackwardArgs a;
        set_backward(a);
        a.gg_x = tensor(3);
        a.grad_dy = tensor(4);
        kernels->double_backward(a, one_thread);
      } else if (c.pass == Case::kBackward) {
        BackwardArgs a;
        set_backward(a);
        if (c.activated) a.epilogue = epilogue;
        kernels->backward(a, one_thread);
      } else {
        ForwardArgs a;
        a.shape = c.shape;
        a.dtype = c.dtype;
        a.x = tensor(0);
        a.y = tensor(1);
        a.eps = 1e-5;
        a.saved = statistics.data();
        if (c.activated) a.epilogue = epilogue;
        kernels->forward(a, one_thread);
      }
    }
    return 0;
  }
  return 2;
}
