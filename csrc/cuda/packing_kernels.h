// Launches of the packing kernels; plain pointers and sizes, so that the kernels need no PyTorch header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace free_kernels {

struct PackLaunch {
  const void* states;
  const int64_t* lengths;
  const int64_t* steps;
  const int64_t* labels;
  const int64_t* timesteps;
  void* x;
  int64_t* t;
  int64_t* y;
  int64_t* row_offsets;
  int64_t slots;
  int64_t draft_length;
  int64_t num_steps;
  int64_t num_rows;
  int64_t row_bytes;
  int64_t null_label;
  bool guided;
  int unit;  // bytes per access: 16, or the size of an element
};

// What one slot has to copy, written by the plan kernel and read by the copy kernel.
struct CommitPlan {
  int64_t draft;  // index of the last committed row in [S * L], or -1: copy nothing
  int64_t row;    // its row of one branch of the features
  int64_t save;   // image to write to, or -1
  int64_t load;   // image to read from, or -1
};

struct CommitLaunch {
  const int64_t* committed;
  const void* next_states;
  const void* draft_states;
  const void* features;
  const int64_t* row_offsets;
  void* state;
  void* previous;
  void* parent;
  int64_t* steps;
  int64_t* images;
  int64_t* labels;
  void* samples;
  const int64_t* all_labels;
  int64_t* queue;
  CommitPlan* plan;  // [S] scratch
  int64_t slots;
  int64_t draft_length;
  int64_t branches;
  int64_t rows;
  int64_t num_images;
  int64_t num_steps;
  int64_t state_bytes;
  int64_t feature_bytes;
  int state_unit;
  int feature_unit;
};

cudaError_t launch_pack(const PackLaunch& launch, cudaStream_t stream);
cudaError_t launch_commit(const CommitLaunch& launch, cudaStream_t stream);

// Architectures that the kernels were compiled for, as 800, 900 ...
std::vector<int> cuda_arch_list();

}  // namespace free_kernels
