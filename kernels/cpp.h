// Vectors of float32 for the C++ kernels, in what GCC and Clang share; and PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float memory_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t memory_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

static inline vec load(const float* p) { return *(const memory_vec*)p; }
static inline void store(float* p, vec x) { *(memory_vec*)p = x; }
static inline vec all(float x) { return vec{} + x; }
// A NaN in a stays.
static inline vec higher(vec a, vec b) { return b > a ? b : a; }
static inline int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static inline float sum_of(vec x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

static inline float highest_of(vec x) {
  float peak = x[0];
  for (int i = 1; i < LANES; i++) peak = x[i] > peak ? x[i] : peak;
  return peak;
}

// 2^y for y of at most about 0, to 2e-7 of its value; 0 where it is no normal number.
static inline vec exp2_of(vec y) {
  y = higher(y, all(-127.0f));
  // Adding 1.5 * 2^23 rounds to the nearest integer, which is left in the low bits.
  const vec shifted = y + 12582912.0f;
  const vec f = y - (shifted - 12582912.0f);
  vec p = f * 1.54035304e-4f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return (vec)((ivec)p + ((ivec)shifted << 23));
}

// to[i] = the bfloat16 from[i]: the upper half of a float32
static inline void widen(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(to + i, (vec)(__builtin_convertvector(*(const memory_halves*)(from + i), ivec) << 16));
  for (; i < n; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(to + i, &bits, 4);
  }
}

// The bfloat16 nearest to from[i], of two the even one; a NaN stays one.
static inline void narrow(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec x = load(from + i);
    const uvec bits = (uvec)x, rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
    *(memory_halves*)(to + i) = __builtin_convertvector((x == x ? rounded : quiet) >> 16, memory_halves);
  }
  for (; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    to[i] = (from[i] == from[i] ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16;
  }
}
