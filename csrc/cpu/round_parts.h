// Parts of `close_round` and `advance_from_features`. Each is an op of its own, too.
#pragma once

#include <cstdint>
#include <optional>

#include "../checks.h"

namespace free_kernels {

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
                     const Tensor& held_clean, const Tensor& response, double guidance_scale,
                     int64_t guidance_channels, double clip);

void commit_on_cpu(const CommitTensors& tensors, const CommitShape& shape);

Tensor renew_slots(const Tensor& steps, const Tensor& images, const Tensor& numbers, const Tensor& indices,
                   const Tensor& rounds);

void find_rows(const Tensor& at, const Tensor& steps, const Tensor& places, const Tensor& before,
               const Tensor& ahead);

}  // namespace free_kernels
