// Products with weights of a byte each, a sign and an exponent: torch.ops.mctf.shift_linear.

typedef int8_t memory_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// to[i] = the weight of code from[i]: a float32's exponent begins at its 24th bit, with 127 for 2^0
static inline void weights_of(const int8_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const ivec code = __builtin_convertvector(*(const memory_bytes*)(from + i), ivec);
    const ivec sign = code >> 31, exponent = (((code ^ sign) - sign + 112) << 23) & (code != 0);
    store(to + i, (vec)(exponent | sign << 31));
  }
  for (; i < count; i++) to[i] = from[i] ? std::copysign(std::ldexp(1.0f, std::abs(from[i]) - 15), from[i]) : 0;
}

// Rows of x times the weights of some outputs, by channel; each sum goes through the channels in their order.
struct ShiftTask {
  const float* const (&left)[ROWS];
  const float* panel;
  int64_t width, depth;
  float (&sums)[ROWS][COLUMNS * LANES];

  template <int V>
  void run(int64_t c) const {
    vec found[ROWS][V];
    multiply<V>(left, panel + c, width, depth, found);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) store(&sums[r][c + v * LANES], found[r][v]);
  }
};

// x [..., C] of two to four dimensions, codes [O, C] that lie row by row or channel by channel, bias [O] -> [..., O]
static Tensor shift_linear(Tensor x, Tensor codes, optional<Tensor> bias) {
  const Operand rows_of(x);
  const Elements bias_of = bias ? Elements(*bias) : Elements();
  const int64_t last = x.dim() - 1, depth = x.size(last), outputs = codes.size(0);
  STD_TORCH_CHECK(codes.size(1) == depth, "shift_linear: weights of ", codes.size(1), " channels for ", depth);
  std::vector<int64_t> shape;
  int64_t rows = 1;
  for (int64_t d = 0; d < last; d++) {
    shape.push_back(x.size(d));
    rows *= x.size(d);
  }
  shape.push_back(outputs);
  const int64_t tokens = last ? x.size(last - 1) : 1, heads = last > 1 ? x.size(last - 2) : 1;
  Tensor result = torch::stable::new_empty(x, shape);
  const int8_t* const code = (const int8_t*)codes.data_ptr();
  char* const out = (char*)result.mutable_data_ptr();
  const int64_t bytes = rows_of.bfloat16 ? 2 : 4;
  constexpr int64_t BLOCK = COLUMNS * LANES;
  const int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
  const int64_t parts = parts_of(rows, blocks), length = (rows + parts - 1) / parts;
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(depth * BLOCK), room(std::max<int64_t>(LANES, ROWS) * depth), added(BLOCK);
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task / parts * BLOCK, count = std::min(BLOCK, outputs - first);
      const int64_t wide = whole_vectors(count), from = task % parts * length, to = std::min(from + length, rows);
      if (codes.stride(0) == 1)
        for (int64_t c = 0; c < depth; c++) weights_of(code + c * codes.stride(1) + first, count, &panel[c * BLOCK]);
      else
        for (int64_t o = 0; o < wide; o += LANES)
          by_channel(
              first + o, outputs, depth,
              [&](int64_t n, float* at) {
                weights_of(code + n * codes.stride(0), depth, at);
                return at;
              },
              room.data(), panel.data() + o, BLOCK);
      if (bias) bias_of.read(first * bias->stride(0), bias->stride(0), count, added.data());
      for (int64_t row = from; row < to; row += ROWS) {
        const float* left[ROWS];
        for (int r = 0; r < ROWS; r++) {
          const int64_t i = std::min(row + r, to - 1), h = i / tokens;
          left[r] = rows_of.row(h / heads, h % heads, i % tokens, depth, room.data() + r * depth);
        }
        float sums[ROWS][BLOCK];
        for_columns(wide, ShiftTask{left, panel.data(), BLOCK, depth, sums});
        for (int64_t r = 0; r < std::min<int64_t>(ROWS, to - row); r++) {
          if (bias)
            for (int64_t o = 0; o < count; o++) sums[r][o] += added[o];
          char* const at = out + ((row + r) * outputs + first) * bytes;
          if (rows_of.bfloat16) narrow(sums[r], count, (uint16_t*)at);
          else memcpy(at, sums[r], count * sizeof(float));
        }
      }
    }
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(mctf, CPU, library) { library.impl("shift_linear_cpp", TORCH_BOX(&shift_linear)); }
