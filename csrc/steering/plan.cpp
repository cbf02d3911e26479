#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace free_kernels {
namespace {

double acceptance(double factor, const double* odds, int64_t count, int64_t place) {
  return 1.0 / (1.0 + factor * odds[std::clamp<int64_t>(place, 0, count - 1)]);
}

// What the drafts of a slot are expected to commit, and that with what they save later; see
// `AcceptanceModel.outlook`.
void value_slot(const PlanInputs& in, int64_t slot, int64_t width, double* gains, double* values) {
  const Odds& odds = in.odds;
  const int64_t step = in.steps[slot], seen = in.seen[slot];
  const auto as_seen = [&](int64_t a) {
    return acceptance(odds.seen_factor, odds.seen, odds.places, step + a);
  };
  const int64_t place = (step + seen) * odds.width - seen;
  // All drafts up to this one accepted in this round, and in the next; tested in the next one if the first
  // refusal lies before, over that.
  double survival = 1.0, later = 1.0, refused_over_later = 0.0;
  for (int64_t a = 0; a < width; ++a) {
    const double before = a ? 1.0 - survival : 0.0;
    survival *=
        a < seen ? as_seen(a) : acceptance(odds.fresh_factor, odds.fresh, odds.steps * odds.width, place + a);
    later *= as_seen(a);
    const double reached = std::max(later, 1e-300);
    refused_over_later += ((1.0 - survival) - before) / reached;
    double saved = 0.0;
    if (in.saved && a + 1 >= seen) {
      const double as_new = acceptance(odds.fresh_factor, odds.first, odds.places, step + 1 + a);
      saved = reached * refused_over_later * std::max(as_seen(a + 1) - as_new, 0.0);
    }
    const bool fits = a < in.room[slot];
    gains[a] = fits ? survival : 0.0;
    values[a] = fits ? survival + in.saved.value_or(0.0) * saved : 0.0;
  }
}

// The best rows first, but each after those before it of its slot, which are taken for its sake.
std::vector<int64_t> order_of(const PlanInputs& in, int64_t width, const std::vector<double>& values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const int64_t slots = static_cast<int64_t>(in.steps.size());
  if (slots == 1) return order;
  const int64_t first = *std::max_element(in.steps.begin(), in.steps.end());
  std::vector<double> best(values.size());
  for (int64_t slot = 0; slot < slots; ++slot) {
    const double behind = static_cast<double>(first - in.steps[slot]) / static_cast<double>(width);
    const double weight = 1.0 + in.behind * std::min(behind, 1.0);
    double largest = -1.0;
    for (int64_t i = (slot + 1) * width - 1; i >= slot * width; --i)
      best[i] = largest = std::max(largest, values[i] * weight);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return best[a] > best[b]; });
  return order;
}

}  // namespace

Plans plan_round(const PlanInputs& in) {
  const int64_t slots = static_cast<int64_t>(in.steps.size()), width = in.lengths.back() - 1;
  std::vector<double> gains(slots * width), values(slots * width);
  for (int64_t slot = 0; slot < slots; ++slot)
    value_slot(in, slot, width, gains.data() + slot * width, values.data() + slot * width);
  const std::vector<int64_t> order = order_of(in, width, values);

  const auto finish = [&](double speed, int64_t longest, int64_t last) {
    Plan plan{speed, 0.0, std::vector<int64_t>(slots)};
    for (int64_t i = 0; i <= last; ++i) {
      const int64_t row = order[i];
      if (row % width >= longest - 1) continue;
      plan.promised += gains[row];
      ++plan.drafts[row / width];
    }
    plan.promised += static_cast<double>(in.images);
    return plan;
  };
  Plans plans;
  for (const int64_t longest : in.lengths) {
    const double* seconds = in.seconds + longest * in.grains;
    double speed = 0.0, committed = 0.0;
    int64_t last = 0, rows = in.images;
    for (size_t i = 0; i < order.size(); ++i) {
      const int64_t row = order[i];
      if (row % width >= longest - 1 || !(values[row] > 0)) continue;
      committed += values[row];
      ++rows;
      const int64_t grains = std::max<int64_t>((rows + in.grain / 2) / in.grain, 1);
      const double now = (static_cast<double>(in.images) + committed) / seconds[grains];
      if (now > speed) {
        speed = now;
        last = static_cast<int64_t>(i);
      }
    }
    if (longest == in.lengths.front()) plans.shortest = finish(speed, longest, last);
    if (longest == in.lengths.front() || speed >= plans.best.speed) plans.best = finish(speed, longest, last);
  }
  return plans;
}

}  // namespace free_kernels
