// Loops for the vector units of the CPU at hand, without flags that the others lack: a loop's body is inlined
// into one function for any CPU and, on x86-64, into another for AVX2, and the running CPU chooses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define FREE_KERNELS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FREE_KERNELS_HAS_AVX2 1
#define FREE_KERNELS_AVX2 __attribute__((target("avx2,fma")))
#else
#define FREE_KERNELS_HAS_AVX2 0
#endif

namespace free_kernels {

// Elements of a block, whose intermediate results are kept in arrays on the stack, 1 KiB each.
constexpr int64_t kBlock = 256;

// A vector of the compilers' (gcc, clang), which they split where the CPU's are shorter.
constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

FREE_KERNELS_INLINE void load(Lanes& lanes, const float* values) {
  std::memcpy(&lanes, values, sizeof(Lanes));
}

// Whether to use AVX2 with its companion, fused multiply-add: the running CPU has both, and PyTorch's own
// switch ATEN_CPU_CAPABILITY does not ask for the plainest kernels. A fused product is not rounded, so the
// two functions differ by rounding.
inline bool has_avx2() {
#if FREE_KERNELS_HAS_AVX2
  static const bool has = [] {
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           (capability == nullptr || std::strcmp(capability, "default") != 0);
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace free_kernels
