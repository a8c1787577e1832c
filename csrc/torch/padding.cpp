#include "padding.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "core/layout.h"

namespace bn_ext {

using at::Tensor;

Tensor valid_positions(const Tensor& valid, const Tensor& input) {
  if (valid.scalar_type() == at::kBool) return valid.dim() == 1 ? valid.unsqueeze(1) : valid;
  return at::arange(input.sym_size(2), valid.options().dtype(at::kLong)).lt(valid.unsqueeze(1));
}

Tensor where_valid(const Tensor& t, const Tensor& valid) {
  const Tensor positions = valid_positions(valid, t);
  return at::where(t.dim() == 2 ? positions : positions.unsqueeze(1), t, at::zeros({}, t.options()));
}

Tensor places_of(const Tensor& valid, const Tensor& input) {
  return valid_positions(valid, input).flatten().nonzero().squeeze(1);
}

bool is_scattered(const Tensor& valid, const Tensor& input) {
  constexpr int64_t kShortRun = 16, kFewRuns = 4;
  const bool planes = input.dim() == 3 && input.stride(2) <= input.stride(1);
  const bool short_rows = planes && input.size(2) < kShortPadded && input.stride(2) == 1 &&
                          input.stride(1) == input.size(2);  // which are read whole
  if (!planes || short_rows || valid.scalar_type() != at::kBool || valid.dim() != 2 || valid.size(0) != input.size(0) ||
      valid.size(1) != input.size(2) || valid.device() != input.device() || valid.layout() != at::kStrided) {
    return false;
  }
  const Tensor bytes = valid.contiguous();
  const auto* const p = static_cast<const uint8_t*>(bytes.const_data_ptr());  // as bool only 0 and 1 may be read
  int64_t runs = 0, values = 0;
  for (int64_t i = 0; i < bytes.numel(); ++i) {
    values += p[i] != 0;
    runs += p[i] != 0 && (i == 0 || p[i - 1] == 0);
  }
  return runs > kFewRuns * input.size(0) && values < kShortRun * runs;
}

Tensor line_at(const Tensor& t, const Tensor& places) {
  return t.transpose(0, 1).reshape({t.size(1), -1}).index_select(1, places).unsqueeze(0);
}

Tensor line_put(const Tensor& line, const Tensor& places, const Tensor& input) {
  const int64_t n = input.size(0), c = input.size(1), l = input.size(2);
  const Tensor all = at::zeros({c, n * l}, line.options()).index_copy_(1, places, line[0]);
  return at::empty_like(input).copy_(all.view({c, n, l}).transpose(0, 1));
}

Tensor rows_at(const Tensor& t, const Tensor& places) {
  if (!t.defined()) return t;
  const Tensor rows = t.dim() == 2 ? t : t.transpose(1, 2).reshape_symint({-1, t.sym_size(1)});
  return rows.index_select(0, places);
}

Tensor rows_put(const Tensor& rows, const Tensor& places, const Tensor& input) {
  if (!rows.defined()) return rows;
  const bool flat = input.dim() == 2;
  const c10::SymInt n = input.sym_size(0), c = input.sym_size(1), l = flat ? c10::SymInt(1) : input.sym_size(2);
  const Tensor all = at::zeros_symint({n * l, c}, rows.options()).index_copy(0, places, rows);
  return flat ? all : all.reshape_symint({n, l, c}).transpose(1, 2);
}

}  // namespace bn_ext
