#include <cmath>

#include "coupling_round.h"

namespace free_kernels {
namespace {

// Row by row: up to the first refused draft, which is reflected, or to the slot's last row, which has none.
Commit decide_rows(const Round& round, int64_t slot, int64_t drafts, const Figures* figures, double*) {
  const int64_t at = slot * round.length;
  for (int64_t row = 0; row < drafts; ++row) {
    const Figures& now = figures[row];
    if (now.infeasible) return draw_directly(row);
    const double keep =
        round.relaxation == nullptr ? 1.0 : 1.0 - static_cast<double>(round.relaxation[at + row]);
    const double score = keep * now.along - keep * keep * now.gap_sq / 2;
    // A score that is not a number refuses.
    if (!(std::log(static_cast<double>(round.uniform[at + row])) <= score))
      return move_ahead(row, -2 * now.along / now.gap_sq, now);
  }
  return draw_directly(drafts);
}

}  // namespace

CouplingTuple couple(const Tensor& draft_states, const Tensor& draft_mean, const Tensor& draft_std,
                     const Tensor& noise, const std::optional<Tensor>& slack_noise, const Tensor& uniform,
                     const Tensor& output, const Tensor& row_offsets, const Tensor& columns,
                     const std::optional<Tensor>& relaxation, double guidance_scale,
                     int64_t guidance_channels, double clip) {
  return run_round("couple",
                   {draft_states, draft_mean, draft_std, noise, slack_noise, uniform, output, row_offsets,
                    columns, relaxation, guidance_scale, guidance_channels, clip},
                   decide_rows);
}

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) { library.impl("couple_cpu", TORCH_BOX(&couple)); }

}  // namespace free_kernels
