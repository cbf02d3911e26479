// Rows of a round on the CPU: how far a draft's law is from the target's, and the state that a slot commits.
//
// The formulas are those of free_kernels/ops/coupling/reference.py, which derives them. In its words, with
// d = z - z', s = z + z' and t = (ratio - 1) / (root + across), the lead of the target is
//
//   lead = gap + shift,  shift = t (across d + push gap) - pull gap,
//
// where push and pull are numbers of the row. So everything that a row's decision needs is a sum of products
// of gap, t, d and s over its elements, and one pass over the row gives all of them.
#pragma once

#include <cstdint>

#include "transition.h"

namespace free_kernels {

// Arguments of a call: contiguous data of S slots of at most L rows of D elements.
struct Round {
  Transition transition;
  int64_t slots, length;
  int64_t packed_rows;       // of one branch
  int64_t row_bytes;         // of the output
  const float* states;       // [S, L, D]
  const float* draft_mean;   // [S, L - 1, D]
  const float* draft_std;    // [S, L - 1, D]
  const float* noise;        // [S, L, D]
  const float* slack_noise;  // [S, L, D]; null where variances are fixed
  const float* uniform;      // [S, L]
  const float* relaxation;   // [S, L]; null without
  const char* output;        // [B R, C or 2 C, H, W]
  const int64_t* offsets;    // [S + 1]
  const Columns* columns;    // [S, L]

  int64_t rows_of(int64_t slot) const {
    const int64_t count = offsets[slot + 1] - offsets[slot];
    return count < 0 ? 0 : count > length ? length : count;
  }
};

// Sums over elements of a row; with fixed variances the first two only.
enum Sum {
  kGapGap,
  kGapSum,  // gap s, or with fixed variances gap z
  kGapDifference,
  kErrorError,        // (ratio - 1)^2
  kRootedRooted,      // with gap / root = w: w w
  kRootedGap,         // w gap
  kRootedDifference,  // w d
  kMovedGap,          // with t d = m: m gap
  kMovedMoved,
  kMovedSum,   // m s
  kScaledGap,  // with t gap = n: n gap
  kScaledScaled,
  kScaledSum,    // n s
  kMovedScaled,  // m n
  kSums
};

struct RowSums {
  double sum[kSums] = {};
  float least_error = 0;  // the smallest ratio - 1, or 0

  void add(const RowSums& other);
};

// What a row's decision needs, and the two numbers of its shift.
struct Figures {
  double gap_sq, along;
  float push, pull;
  bool infeasible;  // without shared slack: the draft is refused and the step drawn from the target
};

// How a slot's new state is made: drawn from the target with the row's noise; or that draw as it is given the
// shared slack, moved on by `ahead` times the lead.
struct Commit {
  int64_t row;
  bool direct;
  float ahead, push, pull;
};

// The sums over elements [first, last) of a drafted row.
RowSums sum_row(const Round& round, int64_t slot, int64_t row, int64_t first, int64_t last);

Figures figures_of(const Round& round, const RowSums& sums);

// Elements [first, last) of a slot's new state, of which `next` is the first of all.
void commit_row(const Round& round, int64_t slot, const Commit& commit, int64_t first, int64_t last,
                float* next);

}  // namespace free_kernels
