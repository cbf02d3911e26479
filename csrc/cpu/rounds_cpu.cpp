// Ops in one call that follow one another in a round. Each part is an op of this folder, and makes its own
// checks.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "coupling_round.h"
#include "round_parts.h"

namespace free_kernels {
namespace {

using OpenedWithNoise = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

OpenedWithNoise open_keyed_round(const Tensor& state, const Tensor& current, const Tensor& timesteps,
                                 const Tensor& table, int64_t length, int64_t seed, const Tensor& images,
                                 bool slack, const std::optional<Tensor>& rounds) {
  const Opened opened = open_round(state, current, timesteps, table, length);
  const auto shape = state.sizes();
  return std::tuple_cat(opened, round_numbers(seed, images, std::get<0>(opened),
                                              {shape[1], shape[2], shape[3]}, slack, rounds));
}

// Rows of features, or of clean samples, that slots hold: all of their tensors or none.
struct Held {
  const char* name;
  const std::optional<Tensor>&at, &places, &before, &ahead;
  bool given() const { return at.has_value(); }
  void check(std::initializer_list<const std::optional<Tensor>*> others) const {
    bool alike =
        places.has_value() == given() && before.has_value() == given() && ahead.has_value() == given();
    for (const auto* other : others) alike = alike && other->has_value() == given();
    STD_TORCH_CHECK(alike, "decide_round: ", name, " must be given whole or not at all");
  }
  void find(const Tensor& steps) const {
    if (given()) find_rows(*at, steps, *places, *before, *ahead);
  }
};

using Decided = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Decided decide_round(const Tensor& draft_states, const Tensor& draft_mean, const Tensor& draft_std,
                     const Tensor& noise, const std::optional<Tensor>& slack_noise, const Tensor& uniform,
                     const Tensor& output, const Tensor& row_offsets, const Tensor& columns,
                     const std::optional<Tensor>& relaxation, double guidance_scale,
                     int64_t guidance_channels, double clip, bool block, const Tensor& lengths,
                     const Tensor& features, const Tensor& state, const Tensor& previous,
                     const Tensor& parent, const Tensor& steps, const Tensor& images, const Tensor& labels,
                     const Tensor& samples, const Tensor& all_labels, const Tensor& queue,
                     const Tensor& numbers, const Tensor& indices, const Tensor& rounds,
                     const Tensor& deviation, const Tensor& table, const std::optional<Tensor>& at,
                     const std::optional<Tensor>& held_states, const std::optional<Tensor>& held_features,
                     const std::optional<Tensor>& places, const std::optional<Tensor>& before,
                     const std::optional<Tensor>& ahead, const std::optional<Tensor>& clean_at,
                     const std::optional<Tensor>& clean_states, const std::optional<Tensor>& clean,
                     const std::optional<Tensor>& clean_places, const std::optional<Tensor>& clean_before,
                     const std::optional<Tensor>& clean_ahead, const std::optional<Tensor>& response,
                     const std::optional<Tensor>& pattern) {
  const Held with_features{"rows of features", at, places, before, ahead};
  const Held with_clean{"rows of clean samples", clean_at, clean_places, clean_before, clean_ahead};
  with_features.check({&held_states, &held_features});
  with_clean.check({&clean_states, &clean, &response, &pattern});
  const auto decide = block ? couple_block : couple;
  const auto [next_states, committed, gap_sq] =
      decide(draft_states, draft_mean, draft_std, noise, slack_noise, uniform, output, row_offsets, columns,
             relaxation, guidance_scale, guidance_channels, clip);
  const CommitTensors tensors{committed, next_states, draft_states, features, row_offsets,
                              state,     previous,    parent,       steps,    images,
                              labels,    samples,     all_labels,   queue};
  const CommitShape shape = check_commit(tensors, table.size(0));
  check_bounds(tensors, shape);
  STD_TORCH_CHECK(deviation.numel() == shape.num_steps, "decide_round: deviation must be of the ",
                  shape.num_steps, " steps of table, got ", deviation.numel());

  const Tensor finite = tally_round(output, next_states, gap_sq, committed, lengths, steps, deviation);
  if (with_features.given())
    keep_rows(draft_states, features, output, row_offsets, committed, lengths, steps, *at, *held_states,
              *held_features);
  if (with_clean.given())
    keep_clean_rows(draft_states, output, row_offsets, committed, lengths, steps, table, *clean_before,
                    *clean_at, *clean_states, *clean, *response, *pattern, guidance_scale, guidance_channels,
                    clip);
  commit_on_cpu(tensors, shape);
  Tensor fresh = renew_slots(steps, images, numbers, indices, rounds);
  with_features.find(steps);
  with_clean.find(steps);

  const int64_t slots = shape.slots;
  // As RoundReport.pack of free_kernels/sampling/round.py.
  Tensor report = empty_on(steps, {4 * slots + 1}, ScalarType::Long);
  int64_t* said = mutable_ints(report);
  std::copy_n(ints(committed), slots, said);
  std::copy_n(ints(images), slots, said + slots);
  std::copy_n(ints(steps), slots, said + 2 * slots);
  const std::optional<Tensor>& found = with_features.given() ? ahead : clean_ahead;
  if (found)
    std::copy_n(ints(*found), slots, said + 3 * slots);
  else
    std::fill_n(said + 3 * slots, slots, 0);
  said[4 * slots] = *ints(finite);
  return {next_states, committed, gap_sq, report, fresh};
}

void advance_from_features(const Tensor& h, const Tensor& table, const Tensor& row_of_timestep,
                           const Tensor& row_of_label, const Tensor& t, const Tensor& y, const Tensor& weight,
                           const std::optional<Tensor>& bias, double eps, int64_t grid_rows,
                           int64_t patch_rows, int64_t patch_columns, const Tensor& states,
                           const Tensor& mean, const Tensor& std, const Tensor& noise, const Tensor& columns,
                           const Tensor& rows, int64_t draft, double guidance_scale,
                           int64_t guidance_channels, double clip) {
  const Tensor output = final_layer(h, table, row_of_timestep, row_of_label, t, y, weight, bias, eps,
                                    grid_rows, patch_rows, patch_columns);
  advance_drafts(states, mean, std, noise, columns, output, rows, draft, draft + 1, guidance_scale,
                 guidance_channels, clip);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("open_keyed_round_cpu", TORCH_BOX(&open_keyed_round));
  library.impl("decide_round_cpu", TORCH_BOX(&decide_round));
  library.impl("advance_from_features_cpu", TORCH_BOX(&advance_from_features));
}

}  // namespace free_kernels
