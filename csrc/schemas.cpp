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
      "pack_drafts(Tensor states, Tensor lengths, Tensor steps, Tensor labels, Tensor timesteps, "
      "SymInt num_rows, int? null_label=None) -> (Tensor x, Tensor t, Tensor y, Tensor row_offsets)");
  library.def(
      "commit_drafts(Tensor committed, Tensor next_states, Tensor draft_states, Tensor features, "
      "Tensor row_offsets, Tensor(a!) state, Tensor(b!) previous, Tensor(c!) parent, Tensor(d!) steps, "
      "Tensor(e!) images, Tensor(f!) labels, Tensor(g!) samples, Tensor all_labels, Tensor(h!) queue, "
      "int num_steps) -> ()");
  library.def(
      "philox_uniform(SymInt seed, Tensor images, Tensor steps, int purpose, SymInt numel, Tensor? "
      "rounds=None) -> Tensor");
  library.def(
      "philox_normal(SymInt seed, Tensor images, Tensor steps, int purpose, SymInt numel, Tensor? "
      "rounds=None) -> Tensor");
  library.def(
      "advance_drafts_cpu(Tensor(a!) states, Tensor(b!) mean, Tensor(c!) std, Tensor noise, Tensor columns,"
      " Tensor output, Tensor rows, int first, int end, float guidance_scale, int guidance_channels, float "
      "clip) -> ()");
  library.def(
      "replay_drafts_cpu(Tensor(a!) states, Tensor(b!) mean, Tensor(c!) std, Tensor noise, Tensor table, "
      "Tensor steps, Tensor held_states, Tensor held_clean, Tensor latest, Tensor before, "
      "Tensor response, Tensor pattern, float clip) -> ()");
  library.def(
      "keep_rows_cpu(Tensor states, Tensor features, Tensor output, Tensor row_offsets, Tensor committed, "
      "Tensor lengths, Tensor steps, Tensor(a!) at, Tensor(b!) held_states, Tensor(c!) held_features) -> "
      "()");
  library.def(
      "keep_clean_rows_cpu(Tensor states, Tensor output, Tensor row_offsets, Tensor committed, Tensor "
      "lengths, Tensor steps, Tensor table, Tensor before, Tensor(a!) at, Tensor(b!) "
      "held_states, Tensor(c!) held_clean, Tensor(d!) response, Tensor(e!) pattern, float guidance_scale, "
      "int "
      "guidance_channels, float clip) -> ()");
  library.def(
      "find_rows_cpu(Tensor(a!) at, Tensor steps, Tensor(b!) places, Tensor(c!) before, "
      "Tensor(d!) ahead) -> ()");
  library.def(
      "tally_round_cpu(Tensor output, Tensor next_states, Tensor gap_sq, Tensor committed, Tensor lengths, "
      "Tensor steps, Tensor(a!) deviation) -> Tensor");
  library.def(
      "open_round_cpu(Tensor state, Tensor current, Tensor timesteps, Tensor table, int length) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "open_keyed_round_cpu(Tensor state, Tensor current, Tensor timesteps, Tensor table, int length, int "
      "seed, Tensor images, bool slack, Tensor? rounds) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  library.def(
      "correct_features_cpu(Tensor drafted, Tensor errors, Tensor state, Tensor previous, Tensor asked,"
      " Tensor latest, int draft, Tensor? active) -> Tensor");
  library.def(
      "renew_slots_cpu(Tensor steps, Tensor images, Tensor numbers, Tensor(a!) indices, Tensor(b!) "
      "rounds) -> Tensor");
  library.def(
      "decide_round_cpu(Tensor draft_states, Tensor draft_mean, Tensor draft_std, Tensor noise, Tensor? "
      "slack_noise, Tensor uniform, Tensor output, Tensor row_offsets, Tensor columns, Tensor? relaxation, "
      "float guidance_scale, int guidance_channels, float clip, bool block, Tensor lengths, Tensor "
      "features, Tensor(a!) state, Tensor(b!) previous, Tensor(c!) parent, Tensor(d!) steps, Tensor(e!) "
      "images, Tensor(f!) labels, Tensor(g!) samples, Tensor all_labels, Tensor(h!) queue, Tensor numbers, "
      "Tensor(i!) indices, Tensor(j!) rounds, Tensor(k!) deviation, Tensor table, Tensor(l!)? at, "
      "Tensor(m!)? held_states, Tensor(n!)? held_features, Tensor(o!)? places, Tensor(p!)? before, "
      "Tensor(q!)? ahead, Tensor(r!)? clean_at, Tensor(s!)? clean_states, Tensor(t!)? clean, Tensor(u!)? "
      "clean_places, Tensor(v!)? clean_before, Tensor(w!)? clean_ahead, Tensor(x!)? response, Tensor(y!)? "
      "pattern) -> (Tensor "
      "next_states, Tensor committed, Tensor gap_sq, Tensor report, Tensor fresh)");
  library.def(
      "philox_round(SymInt seed, Tensor images, Tensor steps, SymInt numel, bool slack, Tensor? rounds=None) "
      "-> "
      "(Tensor noise, Tensor slack_noise, Tensor uniform)");
  library.def("couple_cpu" FREE_KERNELS_COUPLING);
  library.def("couple_block_cpu" FREE_KERNELS_COUPLING);
  library.def(
      "drafter_tokens_cpu(Tensor feature, Tensor previous, Tensor state, Tensor t, Tensor? change_rms, "
      "int time_unit, int patch_height, int patch_width, int state_at, int unit_at, int scaled_at) -> "
      "Tensor");
  library.def(
      "drafter_network_cpu(Tensor feature, Tensor tokens, Tensor modulations, Tensor[] weights, int heads, "
      "float eps) -> Tensor");
  library.def(
      "final_layer_cpu(Tensor h, Tensor rows, Tensor row_of_timestep, Tensor row_of_label, Tensor t, "
      "Tensor y, Tensor weight, Tensor? bias, float eps, int grid_rows, int patch_rows, int patch_columns) "
      "-> Tensor");
  library.def(
      "advance_from_features_cpu(Tensor h, Tensor table, Tensor row_of_timestep, Tensor row_of_label, "
      "Tensor t, Tensor y, Tensor weight, Tensor? bias, float eps, int grid_rows, int patch_rows, int "
      "patch_columns, Tensor(a!) states, Tensor(b!) mean, Tensor(c!) std, Tensor noise, Tensor columns, "
      "Tensor rows, int draft, float guidance_scale, int guidance_channels, float clip) -> ()");
  library.def(
      "adaptive_norm_cpu(Tensor x, Tensor? update, Tensor modulations, Tensor? skip, int gate_at, "
      "int shift_at, int scale_at, int gain_at, float eps) -> (Tensor, Tensor)");
  library.def(
      "table_rows_cpu(Tensor rows, Tensor row_of_timestep, Tensor row_of_label, Tensor t, Tensor y) -> "
      "Tensor");
  library.def(
      "join_rows_cpu(Tensor feature, Tensor previous, Tensor state, Tensor t, Tensor y, Tensor asked, "
      "Tensor features, Tensor before, Tensor latest, Tensor timesteps, Tensor labels, int drafts, int?"
      " null_label, Tensor? chosen) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "row_errors_cpu(Tensor drafted, Tensor features, Tensor latest, int drafts, int inputs, Tensor? "
      "chosen) -> Tensor");
  library.def(
      "draft_rows_cpu(Tensor states, Tensor timesteps, int draft, int branches, Tensor? active) -> (Tensor, "
      "Tensor)");
}
