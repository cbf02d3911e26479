#include <algorithm>
#include <cmath>

#include "coupling_round.h"

namespace free_kernels {
namespace {

// As in free_kernels/ops/coupling/reference_block.py, which has the derivation. An interval of 2 kRadius is
// halved until it is finer than the resolution of noise in float32.
constexpr double kLowestLogWeight = -1e4, kSmallestGap = 1e-30, kRadius = 12.0,
                 kRootHalf = 0.70710678118654752;
constexpr int kHalvings = 30;

// Mass of `a q - p` above t.
double mass_beyond(double a, double delta, double t) {
  const double scaled = t * kRootHalf;
  const double mass = (a * std::erfc(scaled) - std::erfc(scaled + delta * kRootHalf)) * 0.5;
  return mass < 0 ? 0.0 : mass;
}

// Where `a q = p`; the residual is above this point.
double lower_end(double log_a, double delta) { return -delta / 2 - log_a / delta; }

// A draw of the residual along Delta, relative to q's mean, by inverting its tail.
double draw_residual(double log_a, double delta, double uniform) {
  const double a = std::exp(log_a), end = lower_end(log_a, delta);
  const double level = uniform * mass_beyond(a, delta, end);
  double low = end < -kRadius ? -kRadius : end, width = 2 * kRadius;
  for (int i = 0; i < kHalvings; ++i) {
    width /= 2;
    if (mass_beyond(a, delta, low + width) > level) low += width;
  }
  return low + width / 2;
}

double gap_of(const Figures& figures) { return std::max(std::sqrt(figures.gap_sq), kSmallestGap); }

// All drafts together: the last one that passes its test, and after it a draw of the residual.
Commit decide_block(const Round& round, int64_t slot, int64_t drafts, const Figures* figures,
                    double* log_weight) {
  const float* uniform = round.uniform + slot * round.length;
  // Rows from the first one on whose step is drawn directly do not count: one without shared slack, or the
  // last.
  int64_t direct = 0;
  while (direct < drafts && !figures[direct].infeasible) ++direct;
  int64_t tau = 0;
  double walk = 0, highest = 0;
  for (int64_t i = 0; i <= direct; ++i) {
    if (i > 0) walk += figures[i - 1].along - figures[i - 1].gap_sq / 2;
    highest = walk > highest ? walk : highest;
    log_weight[i] = walk - highest;
    const double weight = std::exp(log_weight[i]), missing = -std::expm1(log_weight[i]);
    double mass = weight;
    if (i < direct) {
      const double bounded = std::max(log_weight[i], kLowestLogWeight), delta = gap_of(figures[i]);
      mass = mass_beyond(std::exp(bounded), delta, lower_end(bounded, delta));
    }
    // Where P is 1, h is 1 too, even if R is 0.
    const double threshold = log_weight[i] == 0 ? 1.0 : mass / (mass + missing);
    if (static_cast<double>(uniform[i]) <= threshold) tau = i;
  }
  if (tau == direct) return draw_directly(tau);
  // h_0 is 1, so the uniform of row 0 is not needed for a test and is used for the draw.
  const double delta = gap_of(figures[tau]);
  const double drawn = draw_residual(std::max(log_weight[tau], kLowestLogWeight), delta, uniform[0]);
  return move_ahead(tau, (drawn - figures[tau].along / delta) / delta, figures[tau]);
}

}  // namespace

CouplingTuple couple_block(const Tensor& draft_states, const Tensor& draft_mean, const Tensor& draft_std,
                           const Tensor& noise, const std::optional<Tensor>& slack_noise,
                           const Tensor& uniform, const Tensor& output, const Tensor& row_offsets,
                           const Tensor& columns, const std::optional<Tensor>& relaxation,
                           double guidance_scale, int64_t guidance_channels, double clip) {
  return run_round("couple_block",
                   {draft_states, draft_mean, draft_std, noise, slack_noise, uniform, output, row_offsets,
                    columns, relaxation, guidance_scale, guidance_channels, clip},
                   decide_block);
}

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("couple_block_cpu", TORCH_BOX(&couple_block));
}

}  // namespace free_kernels
