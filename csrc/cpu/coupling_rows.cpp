#include "coupling_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace free_kernels {
namespace {

// As in reference.py.
constexpr double kMaxGapSq = 1e30, kAcrossShare = 0.5, kLeastShared = 1.0 / 1024, kSmallestMeanGapSq = 1e-24;
constexpr float kLeastLeft = 1.0f / 64;
constexpr float kAcross = 0.70710678118654752f;  // the root of kAcrossShare

// Sums are kept in lanes of float32 within a block and in float64 beyond. A lane adds kBlock / kLanes
// products, so the rounding of a sum is at most kBlock / kLanes half spacings of float32 times the sum of its
// products' sizes.
constexpr int64_t kFloatBytes = sizeof(float);
static_assert(kBlock % kLanes == 0);

FREE_KERNELS_INLINE void add_product(Lanes& lanes, const float* a, const float* b) {
  Lanes left, right;
  load(left, a);
  load(right, b);
  lanes += left * right;
}

FREE_KERNELS_INLINE void keep_least(Lanes& least, const float* values) {
  Lanes lanes;
  load(lanes, values);
  least = lanes < least ? lanes : least;
}

// Sums of blocks' lanes: lanes of float64 again, so that only a chunk's end adds up what is in one vector.
struct Total {
  static constexpr int64_t kHalf = kLanes / 2;
  typedef float Narrow __attribute__((vector_size(kHalf * sizeof(float))));
  typedef double Wide __attribute__((vector_size(kHalf * sizeof(double))));
  Wide sums = {};

  FREE_KERNELS_INLINE void add(const Lanes& lanes) {
    Narrow halves[2];
    std::memcpy(halves, &lanes, sizeof(Lanes));
    sums += __builtin_convertvector(halves[0], Wide) + __builtin_convertvector(halves[1], Wide);
  }

  FREE_KERNELS_INLINE double value() const {
    double sum = 0;
    for (int64_t k = 0; k < kHalf; ++k) sum += sums[k];
    return sum;
  }
};

// Pointers to the first elements of a row; the draft's are null in a row that has no room for one.
struct RowPointers {
  const float *state, *mean_p, *std_p, *z, *slack;
  const Columns& columns;
  OutputRow output;

  FREE_KERNELS_INLINE RowPointers(const Round& round, int64_t slot, int64_t row)
      : columns(round.columns[slot * round.length + row]) {
    const int64_t size = round.transition.elements;
    const int64_t at = (slot * round.length + row) * size;
    const int64_t draft = (slot * (round.length - 1) + row) * size;
    state = round.states + at;
    z = round.noise + at;
    slack = round.slack_noise == nullptr ? nullptr : round.slack_noise + at;
    const bool drafted = row < round.length - 1;
    mean_p = drafted ? round.draft_mean + draft : nullptr;
    std_p = drafted ? round.draft_std + draft : nullptr;
    const char* conditional = round.output + (round.offsets[slot] + row) * round.row_bytes;
    const bool guided = round.transition.guided > 0;
    output = {conditional, guided ? conditional + round.packed_rows * round.row_bytes : nullptr};
  }
};

FREE_KERNELS_INLINE int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

FREE_KERNELS_INLINE void pad(float* values, int64_t count) {
  for (int64_t i = count; i < whole_lanes(count); ++i) values[i] = 0.0f;
}

FREE_KERNELS_INLINE void gap_block(const RowPointers& row, int64_t first, int64_t count, const float* mean,
                                   float* __restrict gap) {
  const float *mean_p = row.mean_p + first, *std_p = row.std_p + first;
  for (int64_t i = 0; i < count; ++i) gap[i] = (mean[i] - mean_p[i]) / std_p[i];
}

// What an element of a row with learned variances is compared by.
struct Element {
  float gap, error, t, rooted;  // rooted: gap over the root of what is left of the ratio
};

// Two divisions, where one for each of gap, quotient, t and rooted would round less: gap has two roundings of
// its own in the place of one, so with that of the difference at most 1.5 times the reference's error; ratio
// has nine half spacings in the place of seven. That of t and rooted, two or three roundings more, is below
// the error that they take over from ratio.
FREE_KERNELS_INLINE Element compare(float mean_q, float std_q, float mean_p, float std_p) {
  const float inverse = 1.0f / std_p;
  const float gap = (mean_q - mean_p) * inverse, quotient = std_q * inverse;
  const float ratio = quotient * quotient, error = ratio - 1.0f;
  float left = ratio - static_cast<float>(kAcrossShare);
  left = left < kLeastLeft ? kLeastLeft : left;
  const float root = std::sqrt(left), sum = root + kAcross;
  const float both = 1.0f / (root * sum);
  return {gap, error, error * (root * both), gap * (sum * both)};
}

FREE_KERNELS_INLINE RowSums sum_fixed(const Round& round, const RowPointers& row, int64_t first,
                                      int64_t last) {
  RowSums sums;
  Total totals[2];
  float mean[kBlock], gap[kBlock], noise[kBlock];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    mean_block(round.transition, row.columns, row.output, row.state, begin, count, mean);
    gap_block(row, begin, count, mean, gap);
    const float* z = row.z + begin;
    if (count % kLanes != 0) {
      std::memcpy(noise, z, count * sizeof(float));
      pad(noise, count);
      pad(gap, count);
      z = noise;
    }
    Lanes gap_gap = {}, gap_z = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      add_product(gap_gap, gap + i, gap + i);
      add_product(gap_z, gap + i, z + i);
    }
    totals[0].add(gap_gap);
    totals[1].add(gap_z);
  }
  sums.sum[kGapGap] = totals[0].value();
  sums.sum[kGapSum] = totals[1].value();
  return sums;
}

// Asks for a cache line that is needed a block later: adding up reads no memory, which would idle meanwhile,
// and the CPU's own look-ahead ends with a page. It may lie behind the array, where nothing is read.
FREE_KERNELS_INLINE void prefetch(const void* array, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(array) + bytes));
}

FREE_KERNELS_INLINE RowSums sum_learned(const Round& round, const RowPointers& row, int64_t first,
                                        int64_t last) {
  RowSums sums;
  float mean[kBlock], std_q[kBlock], gap[kBlock], error[kBlock];
  float difference[kBlock], sum[kBlock], rooted[kBlock], moved[kBlock], scaled[kBlock];
  Lanes least = {};
  Total totals[kSums];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    mean_block(round.transition, row.columns, row.output, row.state, begin, count, mean);
    deviation_block(round.transition, row.columns, row.output, begin, count, std_q);
    const float *mean_p = row.mean_p + begin, *std_p = row.std_p + begin;
    const float *z = row.z + begin, *slack = row.slack + begin;
    for (int64_t i = 0; i < count; ++i) {
      const Element element = compare(mean[i], std_q[i], mean_p[i], std_p[i]);
      gap[i] = element.gap;
      error[i] = element.error;
      rooted[i] = element.rooted;
      difference[i] = z[i] - slack[i];
      sum[i] = z[i] + slack[i];
      moved[i] = element.t * difference[i];
      scaled[i] = element.t * element.gap;
    }
    for (float* values : {gap, error, difference, sum, rooted, moved, scaled}) pad(values, count);

    Lanes lanes[kSums] = {};
    const int64_t next = begin + kBlock, bytes = element_bytes(round.transition.kind);
    for (int64_t i = 0; i < count; i += kLanes) {
      prefetch(row.state, (next + i) * kFloatBytes);
      prefetch(row.mean_p, (next + i) * kFloatBytes);
      prefetch(row.std_p, (next + i) * kFloatBytes);
      prefetch(row.z, (next + i) * kFloatBytes);
      add_product(lanes[kGapGap], gap + i, gap + i);
      add_product(lanes[kGapSum], gap + i, sum + i);
      add_product(lanes[kGapDifference], gap + i, difference + i);
      add_product(lanes[kErrorError], error + i, error + i);
      keep_least(least, error + i);
      add_product(lanes[kRootedRooted], rooted + i, rooted + i);
      add_product(lanes[kRootedGap], rooted + i, gap + i);
      add_product(lanes[kRootedDifference], rooted + i, difference + i);
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      prefetch(row.slack, (next + i) * kFloatBytes);
      prefetch(row.output.conditional, (next + i) * bytes);
      prefetch(row.output.conditional, (round.transition.elements + next + i) * bytes);
      if (next + i < round.transition.guided) prefetch(row.output.unconditional, (next + i) * bytes);
      add_product(lanes[kMovedGap], moved + i, gap + i);
      add_product(lanes[kMovedMoved], moved + i, moved + i);
      add_product(lanes[kMovedSum], moved + i, sum + i);
      add_product(lanes[kScaledGap], scaled + i, gap + i);
      add_product(lanes[kScaledScaled], scaled + i, scaled + i);
      add_product(lanes[kScaledSum], scaled + i, sum + i);
      add_product(lanes[kMovedScaled], moved + i, scaled + i);
    }
    for (int k = 0; k < kSums; ++k) totals[k].add(lanes[k]);
  }
  for (int k = 0; k < kSums; ++k) sums.sum[k] = totals[k].value();
  for (int64_t k = 0; k < kLanes; ++k) sums.least_error = std::min(sums.least_error, least[k]);
  return sums;
}

FREE_KERNELS_INLINE RowSums sum_inline(const Round& round, int64_t slot, int64_t row, int64_t first,
                                       int64_t last) {
  const RowPointers pointers(round, slot, row);
  return round.transition.learned ? sum_learned(round, pointers, first, last)
                                  : sum_fixed(round, pointers, first, last);
}

FREE_KERNELS_INLINE void commit_inline(const Round& round, int64_t slot, const Commit& commit, int64_t first,
                                       int64_t last, float* __restrict next) {
  const RowPointers row(round, slot, commit.row);
  const bool learned = round.transition.learned;
  const float ahead = commit.ahead, push = commit.push, pull = commit.pull;
  float mean[kBlock], std_q[kBlock];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    const float* z = row.z + begin;
    float* out = next + begin;
    mean_block(round.transition, row.columns, row.output, row.state, begin, count, mean);
    if (commit.direct || learned)
      deviation_block(round.transition, row.columns, row.output, begin, count, std_q);
    if (commit.direct) {
      for (int64_t i = 0; i < count; ++i) out[i] = mean[i] + std_q[i] * z[i];
      continue;
    }
    const float *mean_p = row.mean_p + begin, *std_p = row.std_p + begin;
    if (!learned) {
      for (int64_t i = 0; i < count; ++i) out[i] = mean[i] + std_p[i] * z[i] + ahead * (mean[i] - mean_p[i]);
      continue;
    }
    const float* slack = row.slack + begin;
    for (int64_t i = 0; i < count; ++i) {
      const Element element = compare(mean[i], std_q[i], mean_p[i], std_p[i]);
      // Added to z and not only to the gap, which may be so large that the sum rounds the shift away.
      const float gap = element.gap;
      const float shift = element.t * (kAcross * (z[i] - slack[i]) + push * gap) - pull * gap;
      out[i] = mean[i] + std_p[i] * ((z[i] + shift) + ahead * (gap + shift));
    }
  }
}

// Each of the two for any CPU and for AVX2.
RowSums sum_any(const Round& round, int64_t slot, int64_t row, int64_t first, int64_t last) {
  return sum_inline(round, slot, row, first, last);
}

void commit_any(const Round& round, int64_t slot, const Commit& commit, int64_t first, int64_t last,
                float* next) {
  commit_inline(round, slot, commit, first, last, next);
}

#if FREE_KERNELS_HAS_AVX2
FREE_KERNELS_AVX2 RowSums sum_avx2(const Round& round, int64_t slot, int64_t row, int64_t first,
                                   int64_t last) {
  return sum_inline(round, slot, row, first, last);
}

FREE_KERNELS_AVX2 void commit_avx2(const Round& round, int64_t slot, const Commit& commit, int64_t first,
                                   int64_t last, float* next) {
  commit_inline(round, slot, commit, first, last, next);
}
#else
constexpr auto sum_avx2 = sum_any;
constexpr auto commit_avx2 = commit_any;
#endif

Figures figures_of_learned(const RowSums& sums) {
  const double* sum = sums.sum;
  const double mean_sq = sum[kGapGap];
  const bool directed = mean_sq > kSmallestMeanGapSq;
  const double inverse = directed ? 1 / std::sqrt(mean_sq) : 0.0;
  // Drafts so far off that products of gap and error would overflow are refused, too. The rule must not
  // depend on z.
  const bool far = !((1 + mean_sq) * (1 + sum[kErrorError]) < kMaxGapSq);
  const bool infeasible = far || !(sums.least_error + (1.0 - kAcrossShare) >= kLeastLeft);

  const double kappa = directed ? sum[kRootedRooted] * inverse * inverse : 1 / (1 - kAcrossShare);
  const double error = 1 / kappa - (1 - kAcrossShare);
  const double longest = std::sqrt(error * error + 4 * mean_sq);
  const double shared = directed
                            ? std::max(std::fabs(error) / (std::fabs(error) + longest), -error) + kLeastShared
                            : 1 - kAcrossShare;
  const double own = 1 - shared, across = std::sqrt(kAcrossShare);
  const double kept_p = std::sqrt(shared), kept_q = std::sqrt(kappa * (error + shared));

  const double difference_u = inverse * sum[kGapDifference];
  const double slack_u = inverse * (sum[kGapSum] - sum[kGapDifference]) / 2, z_u = slack_u + difference_u;
  const double z2_u = kept_p * z_u - std::sqrt(own) * slack_u;
  // z2 = across d + turned u.
  const double turned = z2_u - across * difference_u;
  const double w_z2 = inverse * (across * sum[kRootedDifference] + turned * inverse * sum[kRootedGap]);
  const double moved = (1 - kept_q) * w_z2 / kappa + (kept_p - across) * z2_u;
  const double push = turned * inverse, pull = moved * inverse, rest = 1 - pull;

  // lead = rest gap + across t d + push t gap.
  const double lead_u = inverse * (rest * mean_sq + across * sum[kMovedGap] + push * sum[kScaledGap]);
  const double lead_sq =
      rest * rest * mean_sq + kAcrossShare * sum[kMovedMoved] + push * push * sum[kScaledScaled] +
      2 * (rest * (across * sum[kMovedGap] + push * sum[kScaledGap]) + across * push * sum[kMovedScaled]);
  const double gap_sq = lead_sq / kAcrossShare + (1 / own - 1 / kAcrossShare) * lead_u * lead_u;
  const double lead_sum = rest * sum[kGapSum] + across * sum[kMovedSum] + push * sum[kScaledSum];
  // Terms that cancel may leave a rounding error below 0; a NaN stays.
  return {gap_sq < 0 ? 0.0 : gap_sq, lead_sum + (std::sqrt(shared / own) - 1) * slack_u * lead_u,
          static_cast<float>(push), static_cast<float>(pull), infeasible};
}

}  // namespace

void RowSums::add(const RowSums& other) {
  for (int k = 0; k < kSums; ++k) sum[k] += other.sum[k];
  least_error = std::min(least_error, other.least_error);
}

RowSums sum_row(const Round& round, int64_t slot, int64_t row, int64_t first, int64_t last) {
  return (has_avx2() ? sum_avx2 : sum_any)(round, slot, row, first, last);
}

Figures figures_of(const Round& round, const RowSums& sums) {
  if (round.transition.learned) return figures_of_learned(sums);
  const double gap_sq = sums.sum[kGapGap];
  return {gap_sq, sums.sum[kGapSum], 0.0f, 0.0f, !(gap_sq < kMaxGapSq)};
}

void commit_row(const Round& round, int64_t slot, const Commit& commit, int64_t first, int64_t last,
                float* next) {
  (has_avx2() ? commit_avx2 : commit_any)(round, slot, commit, first, last, next);
}

}  // namespace free_kernels
