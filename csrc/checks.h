// Checks of tensors' metadata, and what the CPU and the CUDA side of `packing` share: arguments and the order
// of a call. Compiled into both modules.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace free_kernels {

struct PackInputs {
  const Tensor& states;     // [S, L, C, H, W] float32, float16 or bfloat16
  const Tensor& lengths;    // [S] int64
  const Tensor& steps;      // [S] int64
  const Tensor& labels;     // [S] int64
  const Tensor& timesteps;  // [K] int64
  int64_t num_rows;
  std::optional<int64_t> null_label;
};

struct PackShape {
  int64_t slots;
  int64_t draft_length;
  int64_t num_steps;
  int64_t branches;   // 2 with guidance, else 1
  int64_t row_bytes;  // bytes of one latent
};

struct PackOutputs {
  Tensor x;            // [branches * num_rows, C, H, W]
  Tensor t;            // [branches * num_rows] int64
  Tensor y;            // [branches * num_rows] int64
  Tensor row_offsets;  // [S + 1] int64
};

struct CommitTensors {
  const Tensor& committed;     // [S] int64
  const Tensor& next_states;   // [S, C, H, W]
  const Tensor& draft_states;  // [S, L, C, H, W]
  const Tensor& features;      // [B * R, T, D]
  const Tensor& row_offsets;   // [S + 1] int64
  const Tensor& state;         // [S, C, H, W], written
  const Tensor& previous;      // [S, C, H, W], written
  const Tensor& parent;        // [B, S, T, D], written
  const Tensor& steps;         // [S] int64, written
  const Tensor& images;        // [S] int64, written
  const Tensor& labels;        // [S] int64, written
  const Tensor& samples;       // [N, C, H, W], written
  const Tensor& all_labels;    // [N] int64
  const Tensor& queue;         // [1] int64, written
};

struct CommitShape {
  int64_t slots;
  int64_t draft_length;
  int64_t branches;
  int64_t rows;  // R: packed rows of one branch
  int64_t num_images;
  int64_t num_steps;
  int64_t state_bytes;    // bytes of one latent
  int64_t feature_bytes;  // bytes of one [T, D] feature
};

// Dtype, shape and device; nothing here reads the tensors' data.
void check_layout(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& same_device_as);
// The same, and contiguity.
void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& same_device_as);
PackShape check_pack(const PackInputs& inputs);
CommitShape check_commit(const CommitTensors& tensors, int64_t num_steps);

PackOutputs empty_pack_outputs(const PackInputs& inputs, const PackShape& shape);

using PackTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The functions that the dispatcher calls; `Run` is the device's part.
template <void (*Run)(const PackInputs&, const PackShape&, const PackOutputs&)>
PackTuple pack_drafts(const Tensor& states, const Tensor& lengths, const Tensor& steps, const Tensor& labels,
                      const Tensor& timesteps, int64_t num_rows, std::optional<int64_t> null_label) {
  const PackInputs inputs{states, lengths, steps, labels, timesteps, num_rows, null_label};
  const PackShape shape = check_pack(inputs);
  PackOutputs outputs = empty_pack_outputs(inputs, shape);
  Run(inputs, shape, outputs);
  return {outputs.x, outputs.t, outputs.y, outputs.row_offsets};
}

template <void (*Run)(const CommitTensors&, const CommitShape&)>
void commit_drafts(const Tensor& committed, const Tensor& next_states, const Tensor& draft_states,
                   const Tensor& features, const Tensor& row_offsets, const Tensor& state,
                   const Tensor& previous, const Tensor& parent, const Tensor& steps, const Tensor& images,
                   const Tensor& labels, const Tensor& samples, const Tensor& all_labels, const Tensor& queue,
                   int64_t num_steps) {
  const CommitTensors tensors{committed, next_states, draft_states, features, row_offsets,
                              state,     previous,    parent,       steps,    images,
                              labels,    samples,     all_labels,   queue};
  Run(tensors, check_commit(tensors, num_steps));
}

}  // namespace free_kernels
