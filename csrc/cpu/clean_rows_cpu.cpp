// Drafts without a network, from clean samples of rows that the target was asked about, and the memory of
// those rows. The formulas are those of free_kernels/ops/drafting/reference.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "floats.h"
#include "output_kind.h"
#include "round_parts.h"

namespace free_kernels {
namespace {

// What a step's responses weigh in the next step's averages, those of elements and their test apart, and how
// many steps with the average response an element begins with; as in the reference.
constexpr float kResponseDecay = 0.7f, kPatternDecay = 0.9f, kPatternPrior = 1.0f;
// Sums of a slot: pairs of the response to new noise, of that to other noise and of the elements' share.
constexpr int64_t kSums = 6;
// Rows of fewer elements are not worth a thread.
constexpr int64_t kGrain = 1 << 15;

// Coefficients by step; those past the ends are the ends'.
struct Table {
  const Columns* columns;
  int64_t num_steps;
  const Columns& at(int64_t step) const { return columns[std::clamp<int64_t>(step, 0, num_steps - 1)]; }
};

// What responses are measured in, as in the reference.
float response_unit(const Columns& columns) {
  return columns.x0_from_state > 0.0f ? columns.x0_from_state : 1.0f;
}

struct Replay {
  float *states, *mean, *std;
  const float* noise;
  Table table;
  const int64_t* steps;
  const float *held_states, *held_clean, *response, *pattern;
  const int64_t *latest, *before;
  int64_t length, size, outputs, width;
  float clip;
};

// The average that a pair of sums holds; `otherwise` where there is nothing to divide by.
float average(const float* sums, float otherwise) {
  return sums[1] > 0 ? std::max(sums[0] / sums[1], 0.0f) : otherwise;
}

// How far an element's own response is from the average, by its sums.
float apart(float along, float length, float average) {
  return std::max((along + kPatternPrior * average) / (length + kPatternPrior), 0.0f) - average;
}

// Elements of a slot that go through all drafts together; no element depends on another.
void replay_block(const Replay& a, int64_t slot, int64_t first, int64_t count) {
  const int64_t size = a.size, before = a.before[slot], step = a.steps[slot];
  const bool learned = a.outputs > size;
  // Clean sample and variances of the draft before, and its mean.
  float said[kBlock], variance[kBlock], at[kBlock];
  // Without a row before the sums are those of the slot's last image.
  const float* sums = a.response + kSums * slot;
  const float to_any = average(sums, 0.0f), share = std::min(average(sums + 4, 0.0f), 1.0f);
  const float *along = a.pattern + 2 * slot * size + first, *lengths = along + size;
  float to_new[kBlock] = {}, to_other[kBlock] = {};
  float* state = a.states + slot * a.length * size + first;
  if (before >= 0) {
    for (int64_t e = 0; e < count; ++e) to_new[e] = to_any + share * apart(along[e], lengths[e], to_any);
    std::fill_n(to_other, count, average(sums + 2, to_any));
    const Columns& columns = a.table.at(step - 1);
    const float *held = a.held_states + before * size + first,
                *clean = a.held_clean + before * a.outputs + first;
    for (int64_t e = 0; e < count; ++e)
      at[e] = columns.mean_from_x0 * clean[e] + columns.mean_from_state_given_x0 * held[e];
    std::copy_n(clean, count, said);
    if (learned) std::copy_n(clean + size, count, variance);
  } else {
    std::copy_n(state, count, at);
    std::fill_n(said, count, 0.0f);
    std::fill_n(variance, count, 0.0f);
  }
  for (int64_t j = 0; j + 1 < a.length; ++j, state += size) {
    const int64_t draft = (slot * (a.length - 1) + j) * size + first;
    const int64_t latest = j < a.width ? a.latest[slot * a.width + j] : -1;
    const Columns& columns = a.table.at(step + j);
    if (latest >= 0) {
      const float* clean = a.held_clean + latest * a.outputs + first;
      std::copy_n(a.held_states + latest * size + first, count, at);
      std::copy_n(clean, count, said);
      if (learned) std::copy_n(clean + size, count, variance);
    }
    const float* response = latest >= 0 ? to_other : to_new;
    const float unit = response_unit(columns);
    float *mean = a.mean + draft, *std = a.std + draft, *next = state + size;
    const float* noise = a.noise + (slot * a.length + j) * size + first;
    for (int64_t e = 0; e < count; ++e) {
      said[e] = clipped(said[e] + unit * response[e] * (state[e] - at[e]), a.clip);
      at[e] = columns.mean_from_x0 * said[e] + columns.mean_from_state_given_x0 * state[e];
      mean[e] = at[e];
    }
    if (learned)
      for (int64_t e = 0; e < count; ++e)
        std[e] = std::exp(columns.log_std + columns.log_std_slope * variance[e]);
    else
      std::fill_n(std, count, std::exp(columns.log_std));
    for (int64_t e = 0; e < count; ++e) next[e] = at[e] + std[e] * noise[e];
  }
}

void replay_drafts(const Tensor& states, const Tensor& mean, const Tensor& std, const Tensor& noise,
                   const Tensor& table, const Tensor& steps, const Tensor& held_states,
                   const Tensor& held_clean, const Tensor& latest, const Tensor& before,
                   const Tensor& response, const Tensor& pattern, double clip) {
  constexpr const char* op = "replay_drafts";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(states.dim() == 5, op, ": states must have 5 dimensions, got ", states.dim());
  STD_TORCH_CHECK(held_clean.dim() == 4, op, ": held_clean must have 4 dimensions, got ", held_clean.dim());
  STD_TORCH_CHECK(latest.dim() == 2, op, ": latest must have 2 dimensions, got ", latest.dim());
  STD_TORCH_CHECK(table.dim() == 2, op, ": table must have 2 dimensions, got ", table.dim());
  const auto s = states.sizes();
  const int64_t held = held_clean.size(0), channels = held_clean.size(1), width = latest.size(1);
  const int64_t num_steps = table.size(0), pixels = s[3] * s[4];
  STD_TORCH_CHECK(s[1] >= 1 && num_steps >= 1, op, ": L and K must be at least 1, got ", s[1], " and ",
                  num_steps);
  check_tensor(op, "states", states, kFloat, {s[0], s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "mean", mean, kFloat, {s[0], s[1] - 1, s[2], s[3], s[4]}, states);
  check_tensor(op, "std", std, kFloat, {s[0], s[1] - 1, s[2], s[3], s[4]}, states);
  check_tensor(op, "noise", noise, kFloat, {s[0], s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "table", table, kFloat, {num_steps, 8}, states);
  check_tensor(op, "steps", steps, kLong, {s[0]}, states);
  check_tensor(op, "held_states", held_states, kFloat, {held, s[2], s[3], s[4]}, states);
  check_tensor(op, "held_clean", held_clean, kFloat, {held, channels, s[3], s[4]}, states);
  STD_TORCH_CHECK(channels == s[2] || channels == 2 * s[2], op, ": held_clean must have ", s[2], " or ",
                  2 * s[2], " channels, got ", channels);
  check_tensor(op, "latest", latest, kLong, {s[0], width}, states);
  check_tensor(op, "before", before, kLong, {s[0]}, states);
  check_tensor(op, "response", response, kFloat, {s[0], 3, 2}, states);
  check_tensor(op, "pattern", pattern, kFloat, {s[0], 2, s[2], s[3], s[4]}, states);
  const auto within = [&](const char* name, const Tensor& places) {
    for (int64_t i = 0; i < places.numel(); ++i)
      STD_TORCH_CHECK(ints(places)[i] < held, op, ": ", name, " must be below ", held, ", got ",
                      ints(places)[i]);
  };
  within("latest", latest);
  within("before", before);

  Replay replay;
  replay.states = floats(states);
  replay.mean = floats(mean);
  replay.std = floats(std);
  replay.noise = const_floats(noise);
  replay.table = {static_cast<const Columns*>(table.const_data_ptr()), num_steps};
  replay.steps = ints(steps);
  replay.held_states = const_floats(held_states);
  replay.held_clean = const_floats(held_clean);
  replay.response = const_floats(response);
  replay.pattern = const_floats(pattern);
  replay.latest = ints(latest);
  replay.before = ints(before);
  replay.length = s[1];
  replay.size = s[2] * pixels;
  replay.outputs = channels * pixels;
  replay.width = width;
  replay.clip = static_cast<float>(clip);
  const int64_t blocks = (replay.size + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * s[1]));
  torch::stable::parallel_for(0, s[0] * blocks, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t first = task % blocks * kBlock;
      replay_block(replay, task / blocks, first, std::min(kBlock, replay.size - first));
    }
  });
}

struct Keeping {
  Transition transition;
  int64_t length, packed, row_bytes, places, outputs;
  const float* states;
  const char* output;
  const int64_t *offsets, *committed, *lengths, *steps, *before;
  Table table;
  int64_t* at;
  float *held_states, *held_clean, *response, *pattern;

  const float* state(int64_t slot, int64_t j) const {
    return states + (slot * length + j) * transition.elements;
  }
};

// The clean sample of a row and its variances; whether they are finite before the sample is clipped.
bool clean_row(const Keeping& a, int64_t slot, int64_t j, float* clean) {
  const int64_t size = a.transition.elements, row = a.offsets[slot] + j;
  const char* conditional = a.output + row * a.row_bytes;
  const OutputRow output{conditional, a.transition.guided ? conditional + a.packed * a.row_bytes : nullptr};
  const Columns& columns = a.table.at(a.steps[slot] + j);
  const float* state = a.state(slot, j);
  bool finite = true;
  float buffer[kBlock];
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = std::min(kBlock, size - first);
    const float* prediction = prediction_block(a.transition, output, first, count, buffer);
    for (int64_t i = 0; i < count; ++i)
      clean[first + i] = columns.x0_from_state * state[first + i] + columns.x0_from_output * prediction[i];
    finite = finite && is_finite(clean + first, count);
    for (int64_t i = 0; i < count; ++i) clean[first + i] = clipped(clean[first + i], a.transition.clip);
    if (!a.transition.learned) continue;
    const float* variance = branch_block(a.transition.kind, conditional, size + first, count, buffer);
    std::copy_n(variance, count, clean + size + first);
    finite = finite && is_finite(clean + size + first, count);
  }
  return finite;
}

// What one step says: how far the state moved from where it was expected, and the clean sample with it.
struct Move {
  float *moved, *changed;  // changes of the clean sample, in the step's unit
  int64_t size;
};

// Of a move: products over squares, and one over the mean square. It says nothing unless both are finite, and
// squares were.
struct Ratio {
  double length_sq;
  float ratio, weight;
  explicit Ratio(const Move& move) {
    const float *moved = move.moved, *changed = move.changed;
    length_sq = sum(move.size, [&](int64_t e) { return moved[e] * moved[e]; });
    const double along = sum(move.size, [&](int64_t e) { return moved[e] * changed[e]; });
    ratio = static_cast<float>(along / length_sq);
    weight = static_cast<float>(static_cast<double>(move.size) / length_sq);
  }
  bool says_something() const { return std::isfinite(ratio) && std::isfinite(weight) && weight > 0.0f; }
};

void add_pair(float* sums, float decay, float first, float second) {
  sums[0] = decay * sums[0] + first;
  sums[1] = decay * sums[1] + second;
}

// Responses of a slot: its sums and those of its elements, how far the elements' own are `apart` from the
// average to new noise, and that average, both as they were before the round.
struct Responses {
  float *sums, *along, *lengths;
  const float* apart;
  float to_new;
};

// Takes a step's response to new noise into the sums and those of the elements, whose own responses it tests.
void add_new(const Responses& responses, const Move& move) {
  const Ratio step(move);
  if (!step.says_something()) return;
  add_pair(responses.sums, kResponseDecay, step.ratio, 1.0f);
  const float *moved = move.moved, *changed = move.changed, *apart = responses.apart;
  const float to_new = responses.to_new;
  const double fits =
      sum(move.size, [&](int64_t e) { return apart[e] * moved[e] * (changed[e] - to_new * moved[e]); });
  const double gaps = sum(move.size, [&](int64_t e) { return apart[e] * moved[e] * (apart[e] * moved[e]); });
  const float fit = static_cast<float>(fits / step.length_sq),
              gap = static_cast<float>(gaps / step.length_sq);
  if (std::isfinite(fit) && std::isfinite(gap)) add_pair(responses.sums + 4, kPatternDecay, fit, gap);
  float *along = responses.along, *lengths = responses.lengths;
  for (int64_t e = 0; e < move.size; ++e) {
    along[e] = kPatternDecay * along[e] + step.weight * (moved[e] * changed[e]);
    lengths[e] = kPatternDecay * lengths[e] + step.weight * (moved[e] * moved[e]);
  }
}

// Floats of a thread: clean samples of two rows, how far each element's own response is from the average, and
// the move of a step.
int64_t scratch_size(const Keeping& a) { return 2 * a.outputs + 3 * a.transition.elements; }

// The responses of a slot that has committed steps; those of a new image begin at 0.
Responses responses_of(const Keeping& a, int64_t slot, float* away) {
  const int64_t size = a.transition.elements;
  float *sums = a.response + kSums * slot, *along = a.pattern + 2 * size * slot, *lengths = along + size;
  if (a.steps[slot] == 0) {
    std::fill_n(sums, kSums, 0.0f);
    std::fill_n(along, 2 * size, 0.0f);
  }
  const float to_new = average(sums, 0.0f);
  for (int64_t e = 0; e < size; ++e) away[e] = apart(along[e], lengths[e], to_new);
  return {sums, along, lengths, away, to_new};
}

// What row j says of the responses, whose step is committed; `past` is the clean sample of the row before.
void add_row(const Keeping& a, int64_t slot, int64_t j, const float* clean, const float* past,
             const Responses& responses, const Move& move) {
  const int64_t size = move.size, step = a.steps[slot] + j, index = slot * a.places + step % (a.places - 1);
  const float *state = a.state(slot, j), inverse = 1.0f / response_unit(a.table.at(step));
  float *moved = move.moved, *changed = move.changed;
  if (a.at[index] == step) {
    const float *there = a.held_states + index * size, *known = a.held_clean + index * a.outputs;
    for (int64_t e = 0; e < size; ++e) {
      moved[e] = state[e] - there[e];
      changed[e] = inverse * (clean[e] - known[e]);
    }
    const Ratio again(move);
    if (again.says_something()) add_pair(responses.sums + 2, kResponseDecay, again.ratio, 1.0f);
  }
  if (j == 0 && a.before[slot] < 0) return;
  const float* there = j > 0 ? a.state(slot, j - 1) : a.held_states + a.before[slot] * size;
  const float* known = j > 0 ? past : a.held_clean + a.before[slot] * a.outputs;
  const Columns& columns = a.table.at(step - 1);
  for (int64_t e = 0; e < size; ++e) {
    moved[e] = state[e] - (columns.mean_from_x0 * known[e] + columns.mean_from_state_given_x0 * there[e]);
    changed[e] = inverse * (clean[e] - known[e]);
  }
  add_new(responses, move);
}

// The rows of a slot in order: committed ones add to its responses, the last of them and those behind are
// kept.
void keep_slot(const Keeping& a, int64_t slot, float* scratch) {
  const int64_t size = a.transition.elements, rows = a.places - 1, done = a.committed[slot];
  float *clean = scratch, *past = clean + a.outputs, *away = past + a.outputs;
  const Move move{away + size, away + 2 * size, size};
  const Responses responses = done > 0 ? responses_of(a, slot, away) : Responses{};
  // One place is left to the row of the step before.
  const int64_t end = std::min(a.lengths[slot], done + rows - 2);
  for (int64_t j = 0; j < end; ++j) {
    const bool finite = clean_row(a, slot, j, clean);
    if (j < done) add_row(a, slot, j, clean, past, responses, move);
    if (j >= done - 1) {
      const int64_t step = a.steps[slot] + j, index = slot * a.places + step % rows;
      std::copy_n(a.state(slot, j), size, a.held_states + index * size);
      std::copy_n(clean, a.outputs, a.held_clean + index * a.outputs);
      a.at[index] = finite ? step : -1;
    }
    std::swap(clean, past);
  }
}

}  // namespace

void keep_clean_rows(const Tensor& states, const Tensor& output, const Tensor& row_offsets,
                     const Tensor& committed, const Tensor& lengths, const Tensor& steps, const Tensor& table,
                     const Tensor& before, const Tensor& at, const Tensor& held_states,
                     const Tensor& held_clean, const Tensor& response, const Tensor& pattern,
                     double guidance_scale, int64_t guidance_channels, double clip) {
  constexpr const char* op = "keep_clean_rows";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(states.dim() == 5, op, ": states must have 5 dimensions, got ", states.dim());
  STD_TORCH_CHECK(output.dim() == 4, op, ": output must have 4 dimensions, got ", output.dim());
  STD_TORCH_CHECK(at.dim() == 2, op, ": at must have 2 dimensions, got ", at.dim());
  STD_TORCH_CHECK(table.dim() == 2, op, ": table must have 2 dimensions, got ", table.dim());
  const auto s = states.sizes(), o = output.sizes();
  const int64_t slots = s[0], places = at.size(1), num_steps = table.size(0), pixels = s[3] * s[4];
  const int64_t branches = guidance_scale == 1.0 ? 1 : 2, packed = o[0] / branches;
  STD_TORCH_CHECK(places >= 3, op, ": M must be at least 2, got ", places - 1);
  STD_TORCH_CHECK(num_steps >= 1, op, ": K must be at least 1, got ", num_steps);
  check_tensor(op, "states", states, kFloat, {slots, s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "output", output, output.scalar_type(), {branches * packed, o[1], s[3], s[4]}, states);
  STD_TORCH_CHECK(o[1] == s[2] || o[1] == 2 * s[2], op, ": output must have ", s[2], " or ", 2 * s[2],
                  " channels, got ", o[1]);
  check_tensor(op, "row_offsets", row_offsets, kLong, {slots + 1}, states);
  check_tensor(op, "committed", committed, kLong, {slots}, states);
  check_tensor(op, "lengths", lengths, kLong, {slots}, states);
  check_tensor(op, "steps", steps, kLong, {slots}, states);
  check_steps(op, steps);
  check_tensor(op, "table", table, kFloat, {num_steps, 8}, states);
  check_tensor(op, "before", before, kLong, {slots}, states);
  check_tensor(op, "at", at, kLong, {slots, places}, states);
  check_tensor(op, "held_states", held_states, kFloat, {slots, places, s[2], s[3], s[4]}, states);
  check_tensor(op, "held_clean", held_clean, kFloat, {slots, places, o[1], s[3], s[4]}, states);
  check_tensor(op, "response", response, kFloat, {slots, 3, 2}, states);
  check_tensor(op, "pattern", pattern, kFloat, {slots, 2, s[2], s[3], s[4]}, states);
  STD_TORCH_CHECK(0 <= guidance_channels && guidance_channels <= s[2], op,
                  ": guidance_channels must be in [0, ", s[2], "], got ", guidance_channels);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t first = ints(row_offsets)[slot], length = ints(lengths)[slot];
    STD_TORCH_CHECK(0 <= ints(committed)[slot] && ints(committed)[slot] <= length && length <= s[1], op,
                    ": committed and lengths must be in order in [0, ", s[1], "], got ",
                    ints(committed)[slot], " and ", length, " of slot ", slot);
    STD_TORCH_CHECK(length == 0 || (first >= 0 && first <= packed - length), op,
                    ": row_offsets must give slot ", slot, " at least ", length, " of the ", packed,
                    " rows, got row ", first);
    STD_TORCH_CHECK(ints(before)[slot] < slots * places, op, ": before must be below ", slots * places,
                    ", got ", ints(before)[slot]);
  }

  Keeping keeping;
  const OutputKind kind = output_kind(op, output.scalar_type());
  keeping.transition = {kind,
                        o[1] == 2 * s[2],
                        s[2] * pixels,
                        branches == 1 ? 0 : guidance_channels * pixels,
                        static_cast<float>(guidance_scale),
                        static_cast<float>(clip)};
  keeping.length = s[1];
  keeping.packed = packed;
  keeping.row_bytes = o[1] * pixels * element_bytes(kind);
  keeping.places = places;
  keeping.outputs = o[1] * pixels;
  keeping.states = const_floats(states);
  keeping.output = static_cast<const char*>(output.const_data_ptr());
  keeping.offsets = ints(row_offsets);
  keeping.committed = ints(committed);
  keeping.lengths = ints(lengths);
  keeping.steps = ints(steps);
  keeping.before = ints(before);
  keeping.table = {static_cast<const Columns*>(table.const_data_ptr()), num_steps};
  keeping.at = mutable_ints(at);
  keeping.held_states = floats(held_states);
  keeping.held_clean = floats(held_clean);
  keeping.response = floats(response);
  keeping.pattern = floats(pattern);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, keeping.outputs * s[1]));
  torch::stable::parallel_for(0, slots, grain, [&](int64_t from, int64_t to) {
    std::vector<float> scratch(scratch_size(keeping));
    for (int64_t slot = from; slot < to; ++slot) keep_slot(keeping, slot, scratch.data());
  });
}

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("replay_drafts_cpu", TORCH_BOX(&replay_drafts));
  library.impl("keep_clean_rows_cpu", TORCH_BOX(&keep_clean_rows));
}

}  // namespace free_kernels
