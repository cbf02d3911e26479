#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "round_parts.h"

namespace free_kernels {
namespace {

const char* bytes(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }
char* mutable_bytes(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

void pack(const PackInputs& inputs, const PackShape& shape, const PackOutputs& outputs) {
  const int64_t* lengths = ints(inputs.lengths);
  const int64_t* steps = ints(inputs.steps);
  const int64_t* labels = ints(inputs.labels);
  const int64_t* timesteps = ints(inputs.timesteps);
  int64_t* row_offsets = mutable_ints(outputs.row_offsets);

  int64_t used = 0;
  for (int64_t s = 0; s < shape.slots; ++s) {
    row_offsets[s] = used;
    STD_TORCH_CHECK(lengths[s] >= 0 && lengths[s] <= shape.draft_length, "pack_drafts: lengths[", s,
                    "] must be in [0, ", shape.draft_length, "], got ", lengths[s]);
    STD_TORCH_CHECK(lengths[s] == 0 || (steps[s] >= 0 && steps[s] <= shape.num_steps - lengths[s]),
                    "pack_drafts: steps[", s, "] must be in [0, ", shape.num_steps - lengths[s],
                    "] for a draft of ", lengths[s], " rows, got ", steps[s]);
    used += lengths[s];
  }
  row_offsets[shape.slots] = used;
  const int64_t num_rows = inputs.num_rows;
  STD_TORCH_CHECK(used <= num_rows, "pack_drafts: num_rows must be at least the sum of lengths, ", used,
                  ", got ", num_rows);

  char* x = mutable_bytes(outputs.x);
  int64_t* t = mutable_ints(outputs.t);
  int64_t* y = mutable_ints(outputs.y);
  const int64_t slot_bytes = shape.draft_length * shape.row_bytes;
  for (int64_t s = 0; s < shape.slots; ++s) {
    if (lengths[s] == 0) continue;
    const int64_t row = row_offsets[s];
    std::memcpy(x + row * shape.row_bytes, bytes(inputs.states) + s * slot_bytes,
                lengths[s] * shape.row_bytes);
    std::copy_n(timesteps + steps[s], lengths[s], t + row);
    std::fill_n(y + row, lengths[s], labels[s]);
  }
  const int64_t padding = num_rows - used;
  if (padding > 0) {
    std::memset(x + used * shape.row_bytes, 0, padding * shape.row_bytes);
    std::fill_n(t + used, padding, timesteps[shape.num_steps - 1]);
    std::fill_n(y + used, padding, 0);
  }
  if (inputs.null_label && num_rows > 0) {
    std::memcpy(x + num_rows * shape.row_bytes, x, num_rows * shape.row_bytes);
    std::copy_n(t, num_rows, t + num_rows);
    std::fill_n(y + num_rows, num_rows, *inputs.null_label);
  }
}

}  // namespace

// Everything is checked before anything is written, so a refused commit leaves no half-made state.
void check_bounds(const CommitTensors& tensors, const CommitShape& shape) {
  const int64_t* committed = ints(tensors.committed);
  const int64_t* row_offsets = ints(tensors.row_offsets);
  const int64_t* steps = ints(tensors.steps);
  const int64_t* images = ints(tensors.images);
  const int64_t next = *ints(tensors.queue);
  STD_TORCH_CHECK(next >= 0, "commit_drafts: queue must be at least 0, got ", next);
  for (int64_t s = 0; s < shape.slots; ++s) {
    STD_TORCH_CHECK(images[s] >= -1 && images[s] < shape.num_images, "commit_drafts: images[", s,
                    "] must be in [-1, ", shape.num_images, "), got ", images[s]);
    if (images[s] < 0) continue;
    STD_TORCH_CHECK(committed[s] >= 0 && committed[s] <= shape.draft_length, "commit_drafts: committed[", s,
                    "] must be in [0, ", shape.draft_length, "], got ", committed[s]);
    if (committed[s] == 0) continue;
    STD_TORCH_CHECK(row_offsets[s] >= 0 && row_offsets[s] <= row_offsets[s + 1] - committed[s] &&
                        row_offsets[s + 1] <= shape.rows,
                    "commit_drafts: row_offsets must give slot ", s, " at least ", committed[s], " of the ",
                    shape.rows, " rows, got [", row_offsets[s], ", ", row_offsets[s + 1], ")");
    STD_TORCH_CHECK(steps[s] >= 0 && steps[s] <= shape.num_steps - committed[s], "commit_drafts: steps[", s,
                    "] must be in [0, ", shape.num_steps - committed[s], "] to commit ", committed[s],
                    " steps, got ", steps[s]);
  }
}

void commit_on_cpu(const CommitTensors& tensors, const CommitShape& shape) {
  check_bounds(tensors, shape);
  const int64_t* committed = ints(tensors.committed);
  const int64_t* row_offsets = ints(tensors.row_offsets);
  const int64_t* all_labels = ints(tensors.all_labels);
  int64_t* steps = mutable_ints(tensors.steps);
  int64_t* images = mutable_ints(tensors.images);
  int64_t* labels = mutable_ints(tensors.labels);
  int64_t* queue = mutable_ints(tensors.queue);
  char* state = mutable_bytes(tensors.state);
  char* previous = mutable_bytes(tensors.previous);
  char* parent = mutable_bytes(tensors.parent);
  char* samples = mutable_bytes(tensors.samples);
  const int64_t state_bytes = shape.state_bytes, feature_bytes = shape.feature_bytes;

  for (int64_t s = 0; s < shape.slots; ++s) {
    const int64_t count = committed[s];
    if (images[s] < 0 || count == 0) continue;
    const int64_t draft = s * shape.draft_length + count - 1;
    const int64_t row = row_offsets[s] + count - 1;
    const char* next = bytes(tensors.next_states) + s * state_bytes;
    std::memcpy(previous + s * state_bytes, bytes(tensors.draft_states) + draft * state_bytes, state_bytes);
    for (int64_t b = 0; b < shape.branches; ++b)
      std::memcpy(parent + (b * shape.slots + s) * feature_bytes,
                  bytes(tensors.features) + (b * shape.rows + row) * feature_bytes, feature_bytes);
    steps[s] += count;
    if (steps[s] == shape.num_steps) {
      std::memcpy(samples + images[s] * state_bytes, next, state_bytes);
      images[s] = -1;
      if (queue[0] < shape.num_images) {
        images[s] = queue[0]++;
        labels[s] = all_labels[images[s]];
        steps[s] = 0;
        next = samples + images[s] * state_bytes;
      }
    }
    std::memcpy(state + s * state_bytes, next, state_bytes);
  }
}

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("pack_drafts", TORCH_BOX(&pack_drafts<pack>));
  library.impl("commit_drafts", TORCH_BOX(&commit_drafts<commit_on_cpu>));
}

}  // namespace free_kernels
