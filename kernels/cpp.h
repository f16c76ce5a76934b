// What the C++ kernels share: vectors of float32, in what GCC and Clang have in common; reading tensors of PyTorch's
// stable ABI; products of small tiles. Each sum is made by one task, in a fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

using std::optional;
using torch::stable::Tensor;

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

// Starts to bring `count` values to the cache, for what is computed meanwhile to hide how long that takes.
template <int WRITE, class T>
static inline void prefetch(const T* from, int64_t count) {
  for (const char *p = (const char*)from, *end = (const char*)(from + count); p < end; p += 64)
    __builtin_prefetch(p, WRITE, 2);
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

// Elements of a tensor of float32 or bfloat16, of which some dimensions may be broadcast.
struct Elements {
  const char* data = nullptr;
  bool bfloat16 = false;

  Elements() = default;
  explicit Elements(const Tensor& x)
      : data((const char*)x.data_ptr()), bfloat16(x.scalar_type() == torch::headeronly::ScalarType::BFloat16) {}

  // to[i] = element first + i * stride
  void read(int64_t first, int64_t stride, int64_t count, float* to) const {
    if (bfloat16) {
      const uint16_t* from = (const uint16_t*)data + first;
      if (stride == 1) widen(from, count, to);
      else
        for (int64_t i = 0; i < count; i++) widen(from + i * stride, 1, to + i);
    } else {
      const float* from = (const float*)data + first;
      if (stride == 1) memcpy(to, from, count * sizeof(float));
      else
        for (int64_t i = 0; i < count; i++) to[i] = from[i * stride];
    }
  }
};

// [B, H, N, D], or what is broadcast to it.
struct Operand : Elements {
  int64_t strides[4] = {};

  Operand() = default;
  explicit Operand(const Tensor& x) : Elements(x) {
    const int64_t missing = 4 - x.dim();
    for (int64_t d = missing; d < 4; d++) strides[d] = x.size(d - missing) == 1 ? 0 : x.stride(d - missing);
  }

  // The position of a row's first element.
  int64_t first(int64_t b, int64_t h, int64_t token) const {
    return b * strides[0] + h * strides[1] + token * strides[2];
  }

  void read_row(int64_t b, int64_t h, int64_t token, int64_t count, float* to) const {
    read(first(b, h, token), strides[3], count, to);
  }

  void prefetch_row(int64_t b, int64_t h, int64_t token, int64_t count) const {
    const int64_t bytes = bfloat16 ? 2 : 4;
    if (strides[3] == 1) prefetch<0>(data + first(b, h, token) * bytes, count * bytes);
  }

  // The row where it lies, if that is in the form that `read_row` would give it; else read into `room`.
  const float* row(int64_t b, int64_t h, int64_t token, int64_t count, float* room) const {
    if (!bfloat16 && strides[3] == 1) return (const float*)data + first(b, h, token);
    read_row(b, h, token, count, room);
    return room;
  }
};

// [B, N]
template <class T>
struct PerToken {
  const T* data = nullptr;
  int64_t batch = 0, token = 0;

  PerToken() = default;
  explicit PerToken(const Tensor& x) : data((const T*)x.data_ptr()), batch(x.stride(0)), token(x.stride(1)) {}
  explicit operator bool() const { return data; }
  T operator()(int64_t b, int64_t n) const { return data[b * batch + n * token]; }
};

// A product keeps ROWS rows by up to COLUMNS vectors in registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int ROWS = 4, COLUMNS = 3;  // of 16 registers
#else
constexpr int ROWS = 6, COLUMNS = 4;  // of 32 registers
#endif

// The sum of each row's lanes, and the highest of them; the rows side by side, since each is one chain of operations.
static inline void sum_of(const vec (&x)[ROWS], float (&sums)[ROWS]) {
  for (int r = 0; r < ROWS; r++) sums[r] = 0;
  for (int i = 0; i < LANES; i++)
    for (int r = 0; r < ROWS; r++) sums[r] += x[r][i];
}

static inline void highest_of(const vec (&x)[ROWS], float (&peaks)[ROWS]) {
  for (int r = 0; r < ROWS; r++) peaks[r] = x[r][0];
  for (int i = 1; i < LANES; i++)
    for (int r = 0; r < ROWS; r++) peaks[r] = x[r][i] > peaks[r] ? x[r][i] : peaks[r];
}

#if defined(__GNUC__) && !defined(__clang__)
// One step of transposing a square of vectors: swaps its halves of width H off the diagonal, in blocks of 2 H.
template <int H>
static inline void swap_halves(vec (&x)[LANES]) {
  ivec upper, lower;
  for (int i = 0; i < LANES; i++) {
    upper[i] = i & H ? LANES + i - H : i;
    lower[i] = i & H ? LANES + i : i + H;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    if (i & H) continue;
    const vec a = x[i], b = x[i + H];
    x[i] = __builtin_shuffle(a, b, upper);
    x[i + H] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (H > 1) swap_halves<H / 2>(x);
}
#endif

// to[c * stride + i] = from[i][c], for LANES rows of `width`; returns the sum of each row's squares
static inline vec transpose(const float* const (&from)[LANES], int64_t width, float* to, int64_t stride) {
  vec squares{};
  int64_t c = 0;
#if defined(__GNUC__) && !defined(__clang__)
  for (; c + LANES <= width; c += LANES) {
    vec x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load(from[i] + c);
    swap_halves<LANES / 2>(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      store(to + (c + i) * stride, x[i]);
      squares += x[i] * x[i];
    }
  }
#endif
  for (; c < width; c++) {
    float* const column = to + c * stride;
    for (int i = 0; i < LANES; i++) column[i] = from[i][c];
    squares += load(column) * load(column);
  }
  return squares;
}

// LANES rows from `first` of `count`, laid out by `transpose`; zeros beyond the last. `row_of(n, room)` is a row where it
// lies, or read into `room`.
template <class RowOf>
static inline vec by_channel(
    int64_t first, int64_t count, int64_t width, RowOf row_of, float* room, float* to, int64_t stride) {
  const float* from[LANES];
  for (int i = 0; i < LANES; i++, room += width)
    from[i] = first + i < count ? row_of(first + i, room) : (float*)memset(room, 0, width * sizeof(float));
  return transpose(from, width, to, stride);
}

// How many tasks to make of one of `units` that has so many tokens, for the threads there are. A task has no fewer than
// 32: each lays out its operands anew.
static inline int64_t parts_of(int64_t tokens, int64_t units) {
  const int64_t tasks = 2 * torch::stable::get_num_threads(), several = std::max<int64_t>(units, 1);
  return std::max<int64_t>(1, std::min((tasks + several - 1) / several, tokens / 32));
}

// sums = left x right[:, V vectors]; left: ROWS rows of `depth`; right: rows that are `stride` apart.
template <int V>
static inline void multiply(
    const float* const (&left)[ROWS], const float* right, int64_t stride, int64_t depth, vec (&sums)[ROWS][V]) {
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) sums[r][v] = vec{};
  for (int64_t d = 0; d < depth; d++) {
    vec columns[V];
    for (int v = 0; v < V; v++) columns[v] = load(right + d * stride + v * LANES);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) sums[r][v] += left[r][d] * columns[v];
  }
}

// Runs `step` for `wide` columns, as many vectors at a time as there are registers for.
template <class Step>
static inline void for_columns(int64_t wide, Step step) {
  int64_t c = 0;
  for (; c + COLUMNS * LANES <= wide; c += COLUMNS * LANES) step.template run<COLUMNS>(c);
  const int64_t left = (wide - c) / LANES;
  if (left == 3) step.template run<3>(c);
  if (left == 2) step.template run<2>(c);
  if (left == 1) step.template run<1>(c);
}
