// The ops' schemas, for every device.
#include "stable_abi.h"

// Arguments of the coupling ops.
#define FREE_KERNELS_COUPLING                                                                           \
  "(Tensor draft_states, Tensor draft_mean, Tensor draft_std, Tensor noise, Tensor? slack_noise, "      \
  "Tensor uniform, Tensor output, Tensor row_offsets, Tensor columns, Tensor? relaxation, "             \
  "float guidance_scale, int guidance_channels, float clip) -> (Tensor next_states, Tensor committed, " \
  "Tensor gap_sq)"

STABLE_TORCH_LIBRARY(free_kernels, library) {
  library.def(
      "pack_drafts(Tensor states, Tensor lengths, Tensor steps, Tensor labels, Tensor timesteps, int "
      "num_rows, "
      "int? null_label=None) -> (Tensor x, Tensor t, Tensor y, Tensor row_offsets)");
  library.def(
      "commit_drafts(Tensor committed, Tensor next_states, Tensor draft_states, Tensor features, "
      "Tensor row_offsets, Tensor(a!) state, Tensor(b!) previous, Tensor(c!) parent, Tensor(d!) steps, "
      "Tensor(e!) images, Tensor(f!) labels, Tensor(g!) samples, Tensor all_labels, Tensor(h!) queue, "
      "int num_steps) -> ()");
  library.def(
      "philox_uniform(int seed, Tensor images, Tensor steps, int purpose, int numel, Tensor? rounds=None) "
      "-> Tensor");
  library.def(
      "philox_normal(int seed, Tensor images, Tensor steps, int purpose, int numel, Tensor? rounds=None) "
      "-> Tensor");
  library.def("couple_cpu" FREE_KERNELS_COUPLING);
  library.def("couple_block_cpu" FREE_KERNELS_COUPLING);
}
