#include <algorithm>
#include <cstring>
#include <vector>

#include "table_index.h"

namespace free_kernels {
namespace {

// Fewer bytes are not worth a thread.
constexpr int64_t kGrain = 1 << 17;

Tensor table_rows(const Tensor& rows, const Tensor& row_of_timestep, const Tensor& row_of_label,
                  const Tensor& t, const Tensor& y) {
  constexpr const char* op = "table_rows";
  STD_TORCH_CHECK(rows.dim() >= 1 && rows.is_contiguous(), op, ": rows must be contiguous and [N, ...]");
  STD_TORCH_CHECK(t.dim() == 1, op, ": t must have 1 dimension, got ", t.dim());
  const int64_t count = t.size(0);
  const std::vector<int64_t> index = table_index(op, rows, row_of_timestep, row_of_label, t, y, count);
  const auto sizes = rows.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[0] = count;
  Tensor out = empty_on(rows, shape.data(), shape.size(), rows.scalar_type());
  const int64_t bytes = count ? out.numel() / count * static_cast<int64_t>(out.element_size()) : 0;
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) std::memcpy(to + i * bytes, from + index[i] * bytes, bytes);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("table_rows_cpu", TORCH_BOX(&table_rows));
}

}  // namespace free_kernels
