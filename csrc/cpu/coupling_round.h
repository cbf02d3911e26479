// Calls of the coupling ops on the CPU: checks of their arguments, and how slots and rows are spread over
// threads.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "coupling_rows.h"

namespace free_kernels {

// As `free_kernels.ops.coupling.arguments.CouplingArguments`.
struct CouplingInputs {
  const Tensor& draft_states;
  const Tensor& draft_mean;
  const Tensor& draft_std;
  const Tensor& noise;
  const std::optional<Tensor>& slack_noise;
  const Tensor& uniform;
  const Tensor& output;
  const Tensor& row_offsets;
  const Tensor& columns;
  const std::optional<Tensor>& relaxation;
  double guidance_scale;
  int64_t guidance_channels;
  double clip;
};

using CouplingTuple = std::tuple<Tensor, Tensor, Tensor>;

// Decides a slot with `drafts` >= 0 drafts, one row less than it has rows: how it commits. May write to
// `scratch`, which holds as many numbers as the longest slot has rows.
using Decide = Commit (*)(const Round& round, int64_t slot, int64_t drafts, const Figures* figures,
                          double* scratch);

// One call. `op` begins the error messages.
CouplingTuple run_round(const char* op, const CouplingInputs& inputs, Decide decide);

CouplingTuple couple(const Tensor& draft_states, const Tensor& draft_mean, const Tensor& draft_std,
                     const Tensor& noise, const std::optional<Tensor>& slack_noise, const Tensor& uniform,
                     const Tensor& output, const Tensor& row_offsets, const Tensor& columns,
                     const std::optional<Tensor>& relaxation, double guidance_scale,
                     int64_t guidance_channels, double clip);

CouplingTuple couple_block(const Tensor& draft_states, const Tensor& draft_mean, const Tensor& draft_std,
                           const Tensor& noise, const std::optional<Tensor>& slack_noise,
                           const Tensor& uniform, const Tensor& output, const Tensor& row_offsets,
                           const Tensor& columns, const std::optional<Tensor>& relaxation,
                           double guidance_scale, int64_t guidance_channels, double clip);

// A draw from the target at a row, and a state ahead of what the target draws with the draft's noise.
inline Commit draw_directly(int64_t row) { return {row, true, 0.0f, 0.0f, 0.0f}; }
inline Commit move_ahead(int64_t row, double ahead, const Figures& figures) {
  return {row, false, static_cast<float>(ahead), figures.push, figures.pull};
}

}  // namespace free_kernels
