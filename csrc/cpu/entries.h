// The level's entries, by element type. Included inside the level's namespace, last.

// call(T()) for the element type of `dtype`.
template <class Call>
inline void for_type(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat64:
      return call(double());
    case DType::kBFloat16:
      return call(bfloat16());
    case DType::kFloat16:
      return call(float16());
    default:
      return call(float());
  }
}

void forward(const ForwardArgs& a, const Parallel& par) {
  for_type(a.dtype, [&](auto t) {
    a.batches.count > 1 ? forward_cut<decltype(t)>(a, par) : forward_typed<decltype(t)>(a, par);
  });
}
void backward(const BackwardArgs& a, const Parallel& par) {
  for_type(a.dtype, [&](auto t) {
    a.batches.count > 1 ? backward_cut<decltype(t)>(a, par) : backward_typed<decltype(t)>(a, par);
  });
}
void double_backward(const DoubleBackwardArgs& a, const Parallel& par) {
  for_type(a.dtype, [&](auto t) { double_backward_typed<decltype(t)>(a, par); });
}
