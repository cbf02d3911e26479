#include "coupling_round.h"

#include <algorithm>
#include <vector>

#include "output_kind.h"

namespace free_kernels {
namespace {

// Elements that a thread is worth waking for, and those of a row that are summed on their own; sums of these
// are added in their order, so that a result does not depend on the number of threads.
constexpr int64_t kGrain = 8192, kChunk = 4096;
static_assert(kChunk % kBlock == 0);

// Contiguous data of the arguments, and the copies that this took.
class Contiguous {
 public:
  template <typename T>
  const T* data(const Tensor& tensor) {
    if (tensor.is_contiguous()) return static_cast<const T*>(tensor.const_data_ptr());
    copies_.push_back(torch::stable::contiguous(tensor));
    return static_cast<const T*>(copies_.back().const_data_ptr());
  }
  template <typename T>
  const T* data(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> copies_;
};

Round checked(const char* op, const CouplingInputs& inputs, Contiguous& contiguous) {
  const Tensor& states = inputs.draft_states;
  STD_TORCH_CHECK(states.dim() == 5, op, ": draft_states must have 5 dimensions, got ", states.dim());
  const auto sizes = states.sizes();
  const int64_t slots = sizes[0], length = sizes[1], c = sizes[2], h = sizes[3], w = sizes[4];
  STD_TORCH_CHECK(length >= 1, op, ": the draft length must be at least 1, got ", length);
  constexpr ScalarType kFloat = ScalarType::Float;
  check_layout(op, "draft_states", states, kFloat, {slots, length, c, h, w}, states);
  check_layout(op, "draft_mean", inputs.draft_mean, kFloat, {slots, length - 1, c, h, w}, states);
  check_layout(op, "draft_std", inputs.draft_std, kFloat, {slots, length - 1, c, h, w}, states);
  check_layout(op, "noise", inputs.noise, kFloat, {slots, length, c, h, w}, states);
  if (inputs.slack_noise)
    check_layout(op, "slack_noise", *inputs.slack_noise, kFloat, {slots, length, c, h, w}, states);
  check_layout(op, "uniform", inputs.uniform, kFloat, {slots, length}, states);
  check_layout(op, "row_offsets", inputs.row_offsets, ScalarType::Long, {slots + 1}, states);
  check_layout(op, "columns", inputs.columns, kFloat, {slots, length, 8}, states);
  if (inputs.relaxation) check_layout(op, "relaxation", *inputs.relaxation, kFloat, {slots, length}, states);

  const Tensor& output = inputs.output;
  STD_TORCH_CHECK(output.dim() == 4, op, ": output must have 4 dimensions, got ", output.dim());
  const int64_t branches = inputs.guidance_scale == 1.0 ? 1 : 2;
  const int64_t outputs = output.size(1);
  STD_TORCH_CHECK(output.size(0) > 0 && output.size(0) % branches == 0 && (outputs == c || outputs == 2 * c),
                  op, ": output must be [B R, ", c, " or ", 2 * c, ", ", h, ", ", w, "], got [",
                  output.size(0), ", ", outputs, ", ...]");
  check_layout(op, "output", output, output.scalar_type(), {output.size(0), outputs, h, w}, states);
  const bool learned = outputs == 2 * c && c > 0;
  STD_TORCH_CHECK(inputs.slack_noise ? learned : !learned || length == 1, op,
                  ": slack_noise must be given exactly where output has 2 C channels, got ",
                  inputs.slack_noise ? "one" : "none");
  STD_TORCH_CHECK(branches == 1 || (inputs.guidance_channels >= 0 && inputs.guidance_channels <= c), op,
                  ": guidance_channels must be in [0, ", c, "], got ", inputs.guidance_channels);

  Round round;
  const int64_t elements = c * h * w;
  round.transition = {output_kind(op, output.scalar_type()),
                      learned,
                      elements,
                      branches == 1 ? 0 : inputs.guidance_channels * h * w,
                      static_cast<float>(inputs.guidance_scale),
                      static_cast<float>(inputs.clip)};
  round.slots = slots;
  round.length = length;
  round.packed_rows = output.size(0) / branches;
  round.row_bytes = outputs * h * w * element_bytes(round.transition.kind);
  round.states = contiguous.data<float>(states);
  round.draft_mean = contiguous.data<float>(inputs.draft_mean);
  round.draft_std = contiguous.data<float>(inputs.draft_std);
  round.noise = contiguous.data<float>(inputs.noise);
  round.slack_noise = contiguous.data<float>(inputs.slack_noise);
  round.uniform = contiguous.data<float>(inputs.uniform);
  round.relaxation = contiguous.data<float>(inputs.relaxation);
  round.output = contiguous.data<char>(output);
  round.offsets = contiguous.data<int64_t>(inputs.row_offsets);
  round.columns = contiguous.data<Columns>(inputs.columns);
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t first = round.offsets[s], end = round.offsets[s + 1];
    const bool known = first >= 0 && end >= 0;
    const int64_t count = known ? round.rows_of(s) : 1;
    STD_TORCH_CHECK(known && (count == 0 || first <= round.packed_rows - count), op,
                    ": row_offsets must give slot ", s, " some of the ", round.packed_rows, " rows, got [",
                    first, ", ", end, ")");
  }
  return round;
}

// The outputs of a call, and the steps from its rows to them.
struct Call {
  const Round& round;
  Decide decide;
  float* next;
  int64_t* committed;
  float* gap_sq;
  int64_t elements, chunks;

  RowSums chunk_sums(int64_t slot, int64_t row, int64_t chunk) const {
    return sum_row(round, slot, row, chunk * kChunk, std::min(elements, (chunk + 1) * kChunk));
  }

  // Of a slot whose figures are known; its state, too, if it has no rows.
  Commit settle(int64_t slot, const Figures* figures, double* scratch) const {
    const int64_t rows = round.rows_of(slot), drafts = rows > 0 ? rows - 1 : 0;
    float* gaps = gap_sq + slot * (round.length - 1);
    for (int64_t j = 0; j < drafts; ++j) gaps[j] = static_cast<float>(figures[j].gap_sq);
    std::fill(gaps + drafts, gaps + round.length - 1, 0.0f);
    committed[slot] = 0;
    if (rows == 0) {
      std::fill_n(next + slot * elements, elements, 0.0f);
      return {};
    }
    const Commit commit = decide(round, slot, drafts, figures, scratch);
    committed[slot] = commit.row + 1;
    return commit;
  }

  void write(int64_t slot, const Commit& commit, int64_t first, int64_t last) const {
    if (committed[slot] > 0) commit_row(round, slot, commit, first, last, next + slot * elements);
  }

  // One slot after another.
  void run_slots(int64_t first, int64_t last) const {
    std::vector<Figures> figures(round.length);
    std::vector<double> scratch(round.length);
    for (int64_t slot = first; slot < last; ++slot) {
      for (int64_t row = 0; row + 1 < round.rows_of(slot); ++row) {
        RowSums sums;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sums.add(chunk_sums(slot, row, chunk));
        figures[row] = figures_of(round, sums);
      }
      write(slot, settle(slot, figures.data(), scratch.data()), 0, elements);
    }
  }

  // All rows at once, in chunks: for few slots and several threads.
  void run_chunks() const {
    const int64_t drafts = round.length - 1, row_count = round.slots * drafts;
    std::vector<RowSums> sums(row_count * chunks);
    torch::stable::parallel_for(0, row_count * chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = i / (drafts * chunks), row = i / chunks % drafts;
        if (row + 1 < round.rows_of(slot)) sums[i] = chunk_sums(slot, row, i % chunks);
      }
    });
    std::vector<Figures> figures(round.length);
    std::vector<double> scratch(round.length);
    std::vector<Commit> commits(round.slots);
    for (int64_t slot = 0; slot < round.slots; ++slot) {
      for (int64_t row = 0; row + 1 < round.rows_of(slot); ++row) {
        RowSums row_sums;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          row_sums.add(sums[(slot * drafts + row) * chunks + chunk]);
        figures[row] = figures_of(round, row_sums);
      }
      commits[slot] = settle(slot, figures.data(), scratch.data());
    }
    torch::stable::parallel_for(0, round.slots * chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * kChunk;
        write(i / chunks, commits[i / chunks], first, std::min(elements, first + kChunk));
      }
    });
  }

  void run() const {
    const int64_t slot_elements = std::max<int64_t>(1, round.length * elements);
    const int64_t threads = round.slots * slot_elements < 2 * kGrain ? 1 : torch::stable::get_num_threads();
    if (threads == 1) {
      run_slots(0, round.slots);
    } else if (round.slots < 4 * threads && chunks > 0) {
      run_chunks();
    } else {
      torch::stable::parallel_for(0, round.slots, std::max<int64_t>(1, kGrain / slot_elements),
                                  [&](int64_t begin, int64_t end) { run_slots(begin, end); });
    }
  }
};

}  // namespace

CouplingTuple run_round(const char* op, const CouplingInputs& inputs, Decide decide) {
  Contiguous contiguous;
  const Round round = checked(op, inputs, contiguous);
  const auto sizes = inputs.draft_states.sizes();
  Tensor next = empty_on(inputs.draft_states, {round.slots, sizes[2], sizes[3], sizes[4]}, ScalarType::Float);
  Tensor committed = empty_on(inputs.draft_states, {round.slots}, ScalarType::Long);
  Tensor gap_sq = empty_on(inputs.draft_states, {round.slots, round.length - 1}, ScalarType::Float);
  const int64_t elements = round.transition.elements;
  const Call call{round,
                  decide,
                  static_cast<float*>(next.mutable_data_ptr()),
                  mutable_ints(committed),
                  static_cast<float*>(gap_sq.mutable_data_ptr()),
                  elements,
                  (elements + kChunk - 1) / kChunk};
  call.run();
  return {next, committed, gap_sq};
}

}  // namespace free_kernels
