// The ops' schemas, for every device.
#include "stable_abi.h"

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
}
