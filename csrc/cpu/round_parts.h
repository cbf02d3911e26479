// Parts of the ops of rounds_cpu.cpp. Each is an op of its own, too.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace free_kernels {

using Opened = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Opened open_round(const Tensor& state, const Tensor& current, const Tensor& timesteps, const Tensor& table,
                  int64_t length);

// As `philox_round`, with numbers of [S, L] rows of the shape `latent`. Where no slack noise is asked for, it
// has 0 channels.
std::tuple<Tensor, Tensor, Tensor> round_numbers(int64_t seed, const Tensor& images, const Tensor& steps,
                                                 const std::vector<int64_t>& latent, bool slack,
                                                 const std::optional<Tensor>& rounds);

// More than any step, with room for a round's rows.
constexpr int64_t kStepLimit = int64_t{1} << 62;

// Whether steps [S], which have been checked as a tensor, may be added to and divided.
inline void check_steps(const char* op, const Tensor& steps, const char* name = "steps") {
  for (int64_t slot = 0; slot < steps.size(0); ++slot)
    STD_TORCH_CHECK(ints(steps)[slot] >= 0 && ints(steps)[slot] < kStepLimit, op, ": ", name, "[", slot,
                    "] must be at least 0 and below 2**62, got ", ints(steps)[slot]);
}

Tensor final_layer(const Tensor& h, const Tensor& rows, const Tensor& row_of_timestep,
                   const Tensor& row_of_label, const Tensor& t, const Tensor& y, const Tensor& weight,
                   const std::optional<Tensor>& bias, double eps, int64_t grid_rows, int64_t patch_rows,
                   int64_t patch_columns);

void advance_drafts(const Tensor& states, const Tensor& mean, const Tensor& std, const Tensor& noise,
                    const Tensor& columns, const Tensor& output, const Tensor& rows, int64_t first,
                    int64_t end, double guidance_scale, int64_t guidance_channels, double clip);

Tensor tally_round(const Tensor& output, const Tensor& next_states, const Tensor& gap_sq,
                   const Tensor& committed, const Tensor& lengths, const Tensor& steps,
                   const Tensor& deviation);

void keep_rows(const Tensor& states, const Tensor& features, const Tensor& output, const Tensor& row_offsets,
               const Tensor& committed, const Tensor& lengths, const Tensor& steps, const Tensor& at,
               const Tensor& held_states, const Tensor& held_features);

void keep_clean_rows(const Tensor& states, const Tensor& output, const Tensor& row_offsets,
                     const Tensor& committed, const Tensor& lengths, const Tensor& steps, const Tensor& table,
                     const Tensor& before, const Tensor& at, const Tensor& held_states,
                     const Tensor& held_clean, const Tensor& response, const Tensor& pattern,
                     double guidance_scale, int64_t guidance_channels, double clip);

// Whether values are in range, of which tensors have been checked.
void check_bounds(const CommitTensors& tensors, const CommitShape& shape);
void commit_on_cpu(const CommitTensors& tensors, const CommitShape& shape);

Tensor renew_slots(const Tensor& steps, const Tensor& images, const Tensor& numbers, const Tensor& indices,
                   const Tensor& rounds);

void find_rows(const Tensor& at, const Tensor& steps, const Tensor& places, const Tensor& before,
               const Tensor& ahead);

}  // namespace free_kernels
