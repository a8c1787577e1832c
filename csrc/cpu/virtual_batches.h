// Virtual batches: each one a pass of its own, and what is one for all of them. Included inside the level's namespace.

// work(i, parallel) for every virtual batch: side by side, or one after the other with all threads in each where they
// are too few to share out.
template <class Work>
inline void for_virtual_batches(const VirtualBatches& batches, const Shape& shape, const Parallel& par,
                                const Work& work) {
  const int64_t elements = batches.size * shape.c * shape.l;
  if (batches.count < 4 * par.threads && elements > kParallelElements) {
    for (int64_t i = 0; i < batches.count; ++i) work(i, par);
    return;
  }
  parallel_for(par, batches.count, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i, Parallel());
  });
}

// Two vectors of doubles for every virtual batch; not Scratch, which the passes use meanwhile.
class OfBatches {
 public:
  OfBatches(int64_t batches, int64_t channels) : channels_(channels), data_(new double[2 * batches * channels]()) {}
  double* row(int64_t batch, int which) const { return data_.get() + (2 * batch + which) * channels_; }
  VectorRef vector(const VectorRef& wanted, int64_t batch, int which) const {
    return wanted ? VectorRef{row(batch, which), DType::kFloat64, 1} : VectorRef();
  }

 private:
  int64_t channels_;
  std::unique_ptr<double[]> data_;
};

template <class T>
inline void forward_cut(const ForwardArgs& a, const Parallel& par) {
  if (a.renorm) {  // each goes by the running statistics that the one before it left
    for (int64_t i = 0; i < a.batches.count; ++i) forward_typed<T>(virtual_batch(a, i), par);
    return;
  }
  const int64_t channels = a.shape.c;
  // With a momentum of 1 a batch leaves its own statistics.
  const OfBatches statistics(a.batches.count, channels);
  for_virtual_batches(a.batches, a.shape, par, [&](int64_t i, const Parallel& p) {
    ForwardArgs one = virtual_batch(a, i);
    one.running_mean = statistics.vector(a.running_mean, i, 0);
    one.running_var = statistics.vector(a.running_var, i, 1);
    one.num_batches_tracked = nullptr;
    one.cumulative = false;
    one.momentum = 1;
    forward_typed<T>(one, p);
  });
  for (int64_t i = 0; i < a.batches.count; ++i) {
    const double momentum = count_batch(a).momentum;
    const ForwardArgs one = virtual_batch(a, i);
    const bool counts = valid_count(one.valid, one.shape) > 0;
    for_blocks(0, counts ? channels : 0, [&](int64_t c, int64_t n) {
      move_running(a.running_mean, c, n, statistics.row(i, 0) + c, momentum);
      move_running(a.running_var, c, n, statistics.row(i, 1) + c, momentum);
    });
  }
}

template <class T>
inline void backward_cut(const BackwardArgs& a, const Parallel& par) {
  const int64_t channels = a.shape.c;
  const OfBatches gradients(a.batches.count, channels);
  for_virtual_batches(a.batches, a.shape, par, [&](int64_t i, const Parallel& p) {
    BackwardArgs one = virtual_batch(a, i);
    one.grad_weight = gradients.vector(a.grad_weight, i, 0);
    one.grad_bias = gradients.vector(a.grad_bias, i, 1);
    backward_typed<T>(one, p);
  });
  const VectorRef* of_parameters[] = {&a.grad_weight, &a.grad_bias};
  for (int which = 0; which < 2; ++which) {
    const VectorRef& to = *of_parameters[which];
    for_blocks(0, to ? channels : 0, [&](int64_t c, int64_t n) {
      Block sum = Block();
      for (int64_t i = 0; i < a.batches.count; ++i) {
        for (int64_t j = 0; j < n; ++j) sum[j] += gradients.row(i, which)[c + j];
      }
      store_block(to, c, n, sum);
    });
  }
}
