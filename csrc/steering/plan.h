// Which drafts a round makes, in C++ since it stands in every round's way; `free_kernels/steering/plan.py`
// has the same with its reference.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace free_kernels {

// Odds that a draft is refused; see `AcceptanceModel`.
struct Odds {
  const double* fresh;  // [K + 1, width]
  int64_t steps, width;
  // Of each step's draft, [places]: as the first new one of its round, and as a seen one.
  const double *first, *seen;
  int64_t places;
  double fresh_factor, seen_factor;
};

struct PlanInputs {
  std::vector<int64_t> steps, seen, room;  // [S]
  Odds odds;
  std::optional<double> saved;   // steps that a saved refusal is worth; without, none are saved
  double behind;                 // of a slot that is a whole window behind the first, beyond 1
  std::vector<int64_t> lengths;  // longest drafts to consider, ascending
  const double* seconds;         // of a round, [longest draft, grains of rows]
  int64_t grains, grain;
  int64_t images;
};

struct Plan {
  double speed;     // steps, with what rows save later, in a second
  double promised;  // steps that the round is expected to commit
  std::vector<int64_t> drafts;
};

struct Plans {
  Plan best, shortest;
};

Plans plan_round(const PlanInputs& inputs);

}  // namespace free_kernels
