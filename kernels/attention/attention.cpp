// Attention over tokens that have sizes, a few queries at a time: their rows of the map stay in the first-level cache.
//
// Keys are laid out channel by channel and values token by token, in float32 whatever the operands are. A bias of -inf
// masks a key; a row that is masked out as a whole has a log-sum-exp of -inf, and 0 as its output.

constexpr float LOG2_E = 1.44269504f;
// How many rows before it is read one is fetched.
constexpr int64_t AHEAD = 2 * ROWS;

// What is attended to, and by what.
struct Problem {
  int64_t batch, heads, queries, keys, width;
  float scale;
  Operand q, k, bias;
  PerToken<float> log_size;
  // For attention's output: values of fused tokens, and the map from tokens to them.
  int64_t value_width = 0;
  Operand v;
  PerToken<int64_t> index;

  Problem(const Tensor& q, const Tensor& k, const optional<Tensor>& log_size, const optional<Tensor>& bias, double scale)
      : batch(q.size(0)), heads(q.size(1)), queries(q.size(2)), keys(k.size(2)), width(q.size(3)), scale(scale), q(q),
        k(k) {
    if (log_size) this->log_size = PerToken<float>(*log_size);
    if (bias) this->bias = Operand(*bias);
  }

  // Where the whole map [B, H, Nq, Nk] is there.
  explicit Problem(const Tensor& map)
      : batch(map.size(0)), heads(map.size(1)), queries(map.size(2)), keys(map.size(3)), width(0), scale(0) {}
};

// One head of one image, on one thread.
struct Head {
  const Problem& p;
  const int64_t b, h, wide, value_wide;  // wide: whole vectors of keys, and of a value's channels
  // Keys by channel, values by token; a few rows of each: queries, terms, weights, output.
  float *keys, *values, *queries, *terms, *biased, *weights, *rows, *output;

  Head(const Problem& p, int64_t plane, int64_t outputs)
      : p(p), b(plane / p.heads), h(plane % p.heads), wide(whole_vectors(p.keys)),
        value_wide(whole_vectors(p.value_width)) {
    const int64_t sizes[] = {p.width * wide, p.keys * value_wide, std::max(ROWS, LANES) * p.width, wide, ROWS * wide,
                             ROWS * wide, ROWS * value_wide, outputs * value_wide};
    float** parts[] = {&keys, &values, &queries, &terms, &biased, &weights, &rows, &output};
    int64_t total = 0;
    for (int64_t size : sizes) total += whole_vectors(size);
    static thread_local std::vector<float> scratch;
    if ((int64_t)scratch.size() < total) scratch.resize(total);
    float* next = scratch.data();
    for (int i = 0; i < 8; i++) {
      *parts[i] = next;
      next += whole_vectors(sizes[i]);
    }
  }

  // Keys, and what they add to the logits of every query: -inf beyond the last.
  void read_keys() const {
    const auto key = [&](int64_t j, float* room) {
      if (j + LANES < p.keys) p.k.prefetch_row(b, h, j + LANES, p.width);
      return p.k.row(b, h, j, p.width, room);
    };
    for (int64_t j = 0; j < wide; j += LANES) by_channel(j, p.keys, p.width, key, queries, keys + j, wide);
    for (int64_t j = 0; j < wide; j++) terms[j] = j >= p.keys ? -INFINITY : p.log_size ? p.log_size(b, j) : 0.0f;
  }

  int64_t fused(int64_t token) const { return p.index ? p.index(b, token) : token; }

  // Values, each repeated for the members of its group.
  void read_values() const {
    for (int64_t j = 0; j < p.keys; j++) {
      float* const to = values + j * value_wide;
      if (j + AHEAD < p.keys) p.v.prefetch_row(b, h, fused(j + AHEAD), p.value_width);
      p.v.read_row(b, h, fused(j), p.value_width, to);
      for (int64_t c = p.value_width; c < value_wide; c++) to[c] = 0;
    }
  }

  const float* terms_of(int r, int64_t query) const {
    if (!p.bias.data) return terms;
    float* const to = biased + r * wide;
    p.bias.read_row(b, h, query, p.keys, to);
    for (int64_t j = 0; j < p.keys; j++) to[j] += terms[j];
    for (int64_t j = p.keys; j < wide; j++) to[j] = -INFINITY;
    return to;
  }

  struct LogitsStep {
    const Head& head;
    const float* queries[ROWS];
    const float* terms[ROWS];
    vec* peaks;

    template <int V>
    void run(int64_t j) {
      const float scale = head.p.scale;
      vec sums[ROWS][V];
      multiply(queries, head.keys + j, head.wide, head.p.width, sums);
      for (int r = 0; r < ROWS; r++) {
        const float* const from = terms[r] + j;
        float* const to = head.weights + r * head.wide + j;
        vec peak = peaks[r];
        for (int v = 0; v < V; v++) {
          const vec logits = sums[r][v] * scale + load(from + v * LANES);
          peak = higher(peak, logits);
          store(to + v * LANES, logits);
        }
        peaks[r] = peak;
      }
    }
  };

  // The logits of `count` queries, in the place of weights, and the highest of each; rows beyond repeat the last.
  void logits(const int64_t* chosen, int count, float (&peaks)[ROWS]) const {
    vec highest[ROWS];
    LogitsStep step{*this, {}, {}, highest};
    for (int r = 0; r < ROWS; r++) {
      const int64_t query = chosen[std::min(r, count - 1)];
      step.queries[r] = p.q.row(b, h, query, p.width, queries + r * p.width);
      if (query + ROWS < p.queries) p.q.prefetch_row(b, h, query + ROWS, p.width);
      step.terms[r] = terms_of(r, query);
      highest[r] = all(-INFINITY);
    }
    for_columns(wide, step);
    highest_of(highest, peaks);
  }

  // Weights exp(logits - level), in the place of the logits, and their sums by row.
  void exponentiate(int count, const float (&levels)[ROWS], float (&sums)[ROWS]) const {
    const int64_t wide = this->wide;
    vec totals[ROWS] = {};
    for (int r = 0; r < count; r++) {
      const float level = levels[r] == -INFINITY ? 0 : levels[r];  // masked out as a whole
      float* const to = weights + r * wide;
      for (int64_t j = 0; j < wide; j += LANES) {
        const vec e = exp2_of((load(to + j) - level) * LOG2_E);
        totals[r] += e;
        store(to + j, e);
      }
    }
    sum_of(totals, sums);
  }

  // Rows of the map of `count` queries: weights, and shares that make the sum of each 1; 0 where all keys are masked.
  void softmax(const int64_t* chosen, int count, float (&peaks)[ROWS], float (&shares)[ROWS]) const {
    float sums[ROWS];
    logits(chosen, count, peaks);
    exponentiate(count, peaks, sums);
    for (int r = 0; r < count; r++) shares[r] = peaks[r] == -INFINITY ? 0 : 1 / sums[r];
  }

  struct ValuesStep {
    const Head& head;
    const float* weights[ROWS];

    template <int V>
    void run(int64_t c) {
      vec sums[ROWS][V];
      multiply(weights, head.values + c, head.value_wide, head.p.keys, sums);
      for (int r = 0; r < ROWS; r++) {
        float* const to = head.rows + r * head.value_wide + c;
        for (int v = 0; v < V; v++) store(to + v * LANES, sums[r][v]);
      }
    }
  };

  // Adds to row outputs[r] of the output shares[r] times the values by weights[r] [Nk], for `count` rows.
  void add(const float* (&weights)[ROWS], int count, const int64_t* outputs, const float* shares) const {
    for (int r = count; r < ROWS; r++) weights[r] = weights[0];
    ValuesStep step{*this, {}};
    std::copy(weights, weights + ROWS, step.weights);
    for_columns(value_wide, step);
    for (int r = 0; r < count; r++) {
      float* const to = output + outputs[r] * value_wide;
      const float* const from = rows + r * value_wide;
      for (int64_t c = 0; c < value_wide; c += LANES) store(to + c, load(to + c) + load(from + c) * shares[r]);
    }
  }
};

// Runs `task(first, last, number, plane)` for the parts of every head's tokens.
template <class Task>
static void for_heads(const Problem& p, int64_t tokens, int64_t parts, Task task) {
  const int64_t length = (tokens + parts - 1) / parts;
  torch::stable::parallel_for(0, p.batch * p.heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = std::min(i % parts * length, tokens);
      task(first, std::min(first + length, tokens), i, i / parts);
    }
  });
}

// The output [B, H, N, Dv] of attention, laid out [B, N, H, Dv] so that joining the heads copies nothing.
struct Output {
  Tensor tensor;
  char* data;
  int64_t heads, tokens, width;
  bool bfloat16;

  Output(const Tensor& v, int64_t tokens)
      : tensor(torch::stable::new_empty(v, {v.size(0), tokens, v.size(1), v.size(3)})),
        data((char*)tensor.mutable_data_ptr()), heads(v.size(1)), tokens(tokens), width(v.size(3)),
        bfloat16(Elements(v).bfloat16) {
    tensor = torch::stable::transpose(tensor, 1, 2);
  }

  // Tokens from `first` to `last` of a head, from rows of float32.
  void write(const Head& head, int64_t first, int64_t last) const {
    for (int64_t n = first; n < last; n++) {
      const float* const from = head.output + (n - first) * head.value_wide;
      const int64_t at = ((head.b * tokens + n) * heads + head.h) * width;
      if (bfloat16) narrow(from, width, (uint16_t*)data + at);
      else memcpy((float*)data + at, from, width * sizeof(float));
    }
  }
};

static Tensor attention(
    Tensor q, Tensor k, Tensor v, optional<Tensor> log_size, optional<Tensor> bias, double scale) {
  Problem p(q, k, log_size, bias, scale);
  p.v = Operand(v);
  p.value_width = v.size(3);
  const Output out(v, p.queries);
  const int64_t parts = parts_of(p.queries, p.batch * p.heads);
  for_heads(p, p.queries, parts, [&](int64_t first, int64_t last, int64_t, int64_t plane) {
    const Head head(p, plane, last - first);
    head.read_keys();
    head.read_values();
    std::fill(head.output, head.output + (last - first) * head.value_wide, 0.0f);
    for (int64_t i = first; i < last; i += ROWS) {
      const int count = std::min<int64_t>(ROWS, last - i);
      int64_t queries[ROWS], outputs[ROWS];
      float peaks[ROWS], shares[ROWS];
      const float* weights[ROWS];
      for (int r = 0; r < count; r++) {
        queries[r] = i + r;
        outputs[r] = i + r - first;
        weights[r] = head.weights + r * head.wide;
      }
      head.softmax(queries, count, peaks, shares);
      head.add(weights, count, outputs, shares);
    }
    out.write(head, first, last);
  });
  return out.tensor;
}

static std::tuple<Tensor, Tensor, Tensor> importance(
    Tensor q, Tensor k, optional<Tensor> log_size, optional<Tensor> bias, double scale, int64_t room) {
  const Problem p(q, k, log_size, bias, scale);
  const int64_t stored = room ? std::min(room / p.keys, p.queries) : 0;
  const auto float32 = torch::headeronly::ScalarType::Float;
  Tensor importance = torch::stable::new_empty(q, {p.batch, p.keys}, float32);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.queries}, float32);
  Tensor map = torch::stable::new_empty(q, {p.batch, p.heads, stored, p.keys}, float32);
  float *const lse_data = (float*)lse.mutable_data_ptr(), *const map_data = (float*)map.mutable_data_ptr();
  const int64_t parts = parts_of(p.queries, p.batch * p.heads), wide = whole_vectors(p.keys);
  const auto stored_row = [&](int64_t plane, int64_t i) { return map_data + (plane * stored + i) * p.keys; };
  std::vector<float> received(p.batch * p.heads * parts * wide);

  for_heads(p, p.queries, parts, [&](int64_t first, int64_t last, int64_t number, int64_t plane) {
    const Head head(p, plane, 0);
    head.read_keys();
    float* const sums = received.data() + number * wide;
    for (int64_t i = first; i < last; i += ROWS) {
      const int count = std::min<int64_t>(ROWS, last - i);
      int64_t queries[ROWS];
      float peaks[ROWS], shares[ROWS];
      for (int r = 0; r < count; r++) {
        queries[r] = i + r;
        if (i + r < stored) prefetch<1>(stored_row(plane, i + r), p.keys);
      }
      head.softmax(queries, count, peaks, shares);
      for (int r = 0; r < count; r++)
        lse_data[plane * p.queries + i + r] = shares[r] == 0 ? -INFINITY : peaks[r] - std::log(shares[r]);
      float* const weights = head.weights;
      for (int64_t j = 0; j < wide; j += LANES) {
        vec sum = load(sums + j);
        for (int r = 0; r < count; r++) {
          const vec share = load(weights + r * wide + j) * shares[r];
          sum += share;
          store(weights + r * wide + j, share);
        }
        store(sums + j, sum);
      }
      for (int r = 0; r < count && i + r < stored; r++)
        memcpy(stored_row(plane, i + r), weights + r * wide, p.keys * sizeof(float));
    }
  });

  float* const total = (float*)importance.mutable_data_ptr();
  for (int64_t b = 0; b < p.batch; b++)
    for (int64_t j = 0; j < p.keys; j++) {
      float sum = 0;
      for (int64_t i = 0; i < p.heads * parts; i++) sum += received[(b * p.heads * parts + i) * wide + j];
      total[b * p.keys + j] = sum / (p.heads * p.queries);
    }
  return {importance, lse, map};
}

static Tensor ahead(
    optional<Tensor> q, optional<Tensor> k, Tensor v, optional<Tensor> log_size, optional<Tensor> bias, double scale,
    Tensor lse, Tensor map, Tensor index, Tensor weight) {
  Problem p = q && k ? Problem(*q, *k, log_size, bias, scale) : Problem(map);
  STD_TORCH_CHECK(p.queries == index.size(1), "ahead: of the map of ", index.size(1), " tokens there are ", p.queries,
                  " rows, and neither q nor k to compute the others from");
  p.v = Operand(v);
  p.value_width = v.size(3);
  p.index = PerToken<int64_t>(index);
  const PerToken<float> weight_of(weight);
  const float *const lse_data = (const float*)lse.data_ptr(), *const map_data = (const float*)map.data_ptr();
  const int64_t fused = v.size(2), stored = map.size(2);
  const auto stored_row = [&](int64_t plane, int64_t i) { return map_data + (plane * stored + i) * p.keys; };
  const Output out(v, fused);

  for_heads(p, fused, parts_of(fused, p.batch * p.heads), [&](int64_t first, int64_t last, int64_t, int64_t plane) {
    const Head head(p, plane, last - first);
    if (stored < p.queries) head.read_keys();
    head.read_values();
    std::fill(head.output, head.output + (last - first) * head.value_wide, 0.0f);

    // Queries that are fused into tokens from `first` to `last`, a few at a time: all among the stored rows, or none.
    int64_t queries[ROWS], outputs[ROWS];
    int count = 0;
    for (int64_t i = 0; i <= p.queries; i++) {
      if (count && (count == ROWS || i == stored || i == p.queries)) {
        float levels[ROWS], shares[ROWS], unused[ROWS];
        const float* weights[ROWS];
        const bool computed = queries[0] >= stored;
        for (int r = 0; r < count; r++) {
          levels[r] = lse_data[plane * p.queries + queries[r]];
          shares[r] = levels[r] == -INFINITY ? 0 : weight_of(head.b, queries[r]);
          weights[r] = computed ? head.weights + r * head.wide : stored_row(plane, queries[r]);
        }
        if (computed) {
          head.logits(queries, count, unused);
          head.exponentiate(count, levels, unused);
        }
        head.add(weights, count, outputs, shares);
        count = 0;
      }
      if (i == p.queries) break;
      const int64_t m = head.fused(i);
      if (i + AHEAD < stored) prefetch<0>(stored_row(plane, i + AHEAD), p.keys);
      if (m >= first && m < last) queries[count] = i, outputs[count++] = m - first;
    }
    out.write(head, first, last);
  });
  return out.tensor;
}

STABLE_TORCH_LIBRARY_IMPL(mctf, CPU, library) {
  library.impl("attention_cpp", TORCH_BOX(&attention));
  library.impl("importance_cpp", TORCH_BOX(&importance));
  library.impl("ahead_cpp", TORCH_BOX(&ahead));
}
