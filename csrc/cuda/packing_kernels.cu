#include <algorithm>

#include "packing_kernels.h"

namespace free_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Bytes that one block copies of one row before it strides on.
constexpr int64_t kBlockBytes = 4 * kThreads * 16;
// For sm_120 the compiler would rather spill than run fewer blocks on a multiprocessor; four of these
// suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define COPY_LAUNCH_BOUNDS __launch_bounds__(kThreads, 4)
#else
#define COPY_LAUNCH_BOUNDS __launch_bounds__(kThreads)
#endif

__device__ int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// Inclusive prefix sum over a warp.
__device__ int64_t warp_scan(int64_t value, int lane) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// The grid's y dimension shares one row. Destinations never overlap the source; a null source writes zeros,
// and a null second destination is skipped.
template <typename Unit>
__device__ void copy_units(const void* source, void* first, void* second, int64_t bytes) {
  const Unit* from = static_cast<const Unit*>(source);
  Unit* to = static_cast<Unit*>(first);
  Unit* also = static_cast<Unit*>(second);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < count; i += stride) {
    const Unit value = from ? from[i] : Unit{};
    to[i] = value;
    if (also) also[i] = value;
  }
}

__device__ void copy_row(const void* source, void* first, void* second, int64_t bytes, int unit) {
  if (unit == 16) {
    copy_units<uint4>(source, first, second, bytes);
  } else if (unit == 4) {
    copy_units<uint32_t>(source, first, second, bytes);
  } else {
    copy_units<uint16_t>(source, first, second, bytes);
  }
}

__device__ const char* at(const void* base, int64_t index, int64_t bytes) {
  return static_cast<const char*>(base) + index * bytes;
}
__device__ char* at(void* base, int64_t index, int64_t bytes) {
  return static_cast<char*>(base) + index * bytes;
}

// One block column per row. The first warp finds the row's slot by a running sum of the lengths, so that no
// second launch is needed; block (0, 0) goes on to the end and writes the offsets. Values out of range are
// clamped: a device cannot raise, but it must not read astray.
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackLaunch a) {
  __shared__ int64_t shared_slot, shared_position;
  const int64_t row = blockIdx.x;
  const bool writes_offsets = blockIdx.x == 0 && blockIdx.y == 0;
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    if (lane == 0) shared_slot = -1;
    __syncwarp();
    int64_t before = 0;
    for (int64_t first = 0; first < a.slots && (writes_offsets || before <= row); first += kWarp) {
      const int64_t s = first + lane;
      const int64_t length = s < a.slots ? clamp(a.lengths[s], 0, a.draft_length) : 0;
      const int64_t end = before + warp_scan(length, lane);
      if (row >= end - length && row < end) {
        shared_slot = s;
        shared_position = row - (end - length);
      }
      if (writes_offsets && s < a.slots) a.row_offsets[s + 1] = end;
      before = __shfl_sync(kAllLanes, end, kWarp - 1);
    }
    if (writes_offsets && lane == 0) a.row_offsets[0] = 0;
  }
  __syncthreads();
  if (row >= a.num_rows) return;

  const int64_t slot = shared_slot;
  const bool used = slot >= 0;
  const int64_t position = used ? shared_position : 0;
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    const int64_t step = used ? clamp(a.steps[slot] + position, 0, a.num_steps - 1) : a.num_steps - 1;
    const int64_t timestep = a.timesteps[step];
    a.t[row] = timestep;
    a.y[row] = used ? a.labels[slot] : 0;
    if (a.guided) {
      a.t[a.num_rows + row] = timestep;
      a.y[a.num_rows + row] = a.null_label;
    }
  }
  const void* source = used ? at(a.states, slot * a.draft_length + position, a.row_bytes) : nullptr;
  void* second = a.guided ? at(a.x, a.num_rows + row, a.row_bytes) : nullptr;
  copy_row(source, at(a.x, row, a.row_bytes), second, a.row_bytes, a.unit);
}

// One warp decides for all slots, 32 at a time, and owns every counter. The ballot numbers the finished slots
// in ascending order, so which image a slot takes does not depend on timing. A slot with a value out of range
// is left alone.
__global__ void __launch_bounds__(kWarp) commit_plan_kernel(const CommitLaunch a) {
  const int lane = threadIdx.x;
  int64_t next = a.queue[0];
  for (int64_t first = 0; first < a.slots; first += kWarp) {
    const int64_t s = first + lane;
    const bool exists = s < a.slots;
    const int64_t image = exists ? a.images[s] : -1;
    const int64_t count = exists ? a.committed[s] : 0;
    const int64_t row = exists ? a.row_offsets[s] + count - 1 : -1;
    const int64_t step = exists ? a.steps[s] + count : 0;
    const bool live = image >= 0 && image < a.num_images && count >= 1 && count <= a.draft_length &&
                      row >= 0 && row < a.rows && step >= count && step <= a.num_steps;
    const bool done = live && step == a.num_steps;
    const unsigned finished = __ballot_sync(kAllLanes, done);
    const int64_t candidate = next + __popc(finished & ((1u << lane) - 1));
    const bool refilled = done && candidate >= 0 && candidate < a.num_images;
    next += __popc(__ballot_sync(kAllLanes, refilled));
    if (live) a.steps[s] = refilled ? 0 : step;
    if (done) a.images[s] = refilled ? candidate : -1;
    if (refilled) a.labels[s] = a.all_labels[candidate];
    if (exists)
      a.plan[s] = {live ? s * a.draft_length + count - 1 : -1, row, done ? image : -1,
                   refilled ? candidate : -1};
  }
  if (lane == 0) a.queue[0] = next;
}

// Grid: slot, share of a row, and 0 for the latents or 1 + branch for the features. An image being saved and
// one being loaded are never the same, so blocks need no order among themselves.
__global__ void COPY_LAUNCH_BOUNDS commit_copy_kernel(const CommitLaunch a) {
  const int64_t s = blockIdx.x;
  const CommitPlan plan = a.plan[s];
  if (plan.draft < 0) return;
  if (blockIdx.z > 0) {
    const int64_t branch = blockIdx.z - 1;
    copy_row(at(a.features, branch * a.rows + plan.row, a.feature_bytes),
             at(a.parent, branch * a.slots + s, a.feature_bytes), nullptr, a.feature_bytes, a.feature_unit);
    return;
  }
  const int64_t bytes = a.state_bytes;
  copy_row(at(a.draft_states, plan.draft, bytes), at(a.previous, s, bytes), nullptr, bytes, a.state_unit);
  char* state = at(a.state, s, bytes);
  const char* next = at(a.next_states, s, bytes);
  char* saved = plan.save >= 0 ? at(a.samples, plan.save, bytes) : nullptr;
  if (plan.load < 0) {
    copy_row(next, state, saved, bytes, a.state_unit);
  } else {
    copy_row(next, saved, nullptr, bytes, a.state_unit);
    copy_row(at(static_cast<const void*>(a.samples), plan.load, bytes), state, nullptr, bytes, a.state_unit);
  }
}

unsigned shares(int64_t bytes) {
  return static_cast<unsigned>(std::clamp<int64_t>((bytes + kBlockBytes - 1) / kBlockBytes, 1, 1024));
}

}  // namespace

cudaError_t launch_pack(const PackLaunch& launch, cudaStream_t stream) {
  // A call without rows still has offsets to write.
  const dim3 grid(static_cast<unsigned>(std::max<int64_t>(launch.num_rows, 1)), shares(launch.row_bytes));
  pack_kernel<<<grid, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t launch_commit(const CommitLaunch& launch, cudaStream_t stream) {
  commit_plan_kernel<<<1, kWarp, 0, stream>>>(launch);
  const dim3 grid(static_cast<unsigned>(launch.slots),
                  shares(std::max(launch.state_bytes, launch.feature_bytes)),
                  static_cast<unsigned>(1 + launch.branches));
  commit_copy_kernel<<<grid, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

std::vector<int> cuda_arch_list() {
#ifdef __CUDA_ARCH_LIST__
  return {__CUDA_ARCH_LIST__};
#else
  return {};
#endif
}

}  // namespace free_kernels
