// Which tokens leave, and into which: torch.ops.mctf.match; see there for the order, and for ties.
//
// The scores of an image are those of unprotected tokens at even positions (rows) with those at odd ones (columns), a
// row in whole vectors, -inf beyond the last column.

typedef int32_t memory_ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct Matching {
  int64_t batch, tokens, channels, leaving, lead, tail;
  float tau_sim, tau_info, tau_size;
  bool bidirectional;
  Operand x;  // [B, N, C]
  PerToken<float> importance, size;

  int64_t first() const { return lead + lead % 2; }
  int64_t second() const { return lead + 1 - lead % 2; }
  int64_t rows() const { return (tokens - tail - first() + 1) / 2; }
  int64_t columns() const { return std::max<int64_t>(tokens - lead - tail - rows(), 0); }
  int64_t wide() const { return whole_vectors(columns()); }
};

// emphasis[n] *= (least / criterion)^(1 / tau), which is at most 1 whatever the temperature.
static void emphasize(const Matching& m, const PerToken<float>& criterion, int64_t b, float tau, float* emphasis) {
  if (!tau || !criterion) return;
  const auto at = [&](int64_t n) {
    const float c = criterion(b, n);
    return c < 1.17549435e-38f ? 1.17549435e-38f : c;
  };
  float least = INFINITY;
  for (int64_t n = 0; n < m.tokens; n++) least = at(n) < least || at(n) != at(n) ? at(n) : least;
  for (int64_t n = 0; n < m.tokens; n++)
    emphasis[n] *= tau == 1 ? least / at(n) : std::pow(least / at(n), 1 / tau);
}

// One image's tokens, and what the criteria beside similarity make of each. Columns are laid out channel by channel;
// what brings a token to unit length is a factor of its own.
struct Image {
  const Matching& m;
  const int64_t b, wide;
  float *columns, *rows, *emphasis, *column_emphasis, *column_inverse;

  Image(const Matching& m, int64_t b) : m(m), b(b), wide(m.wide()) {
    static thread_local std::vector<float> scratch;
    const int64_t of_columns = m.channels * wide, of_rows = whole_vectors(std::max(ROWS, LANES) * m.channels);
    scratch.resize(std::max<int64_t>(scratch.size(), of_columns + of_rows + 2 * wide + m.tokens));
    columns = scratch.data();
    rows = columns + of_columns;
    column_emphasis = rows + of_rows;
    column_inverse = column_emphasis + wide;
    emphasis = column_inverse + wide;
    std::fill(emphasis, emphasis + m.tokens, 1.0f);
    emphasize(m, m.importance, b, m.tau_info, emphasis);
    emphasize(m, m.size, b, m.tau_size, emphasis);
    for (int64_t j = 0; j < wide; j++) column_emphasis[j] = j < m.columns() ? emphasis[m.second() + 2 * j] : 0;
    if (!m.tau_sim) return;
    const auto column = [&](int64_t j, float* room) { return token(m.second() + 2 * j, room); };
    for (int64_t j = 0; j < wide; j += LANES) {
      const vec squares = by_channel(j, m.columns(), m.channels, column, rows, columns + j, wide);
      for (int i = 0; i < LANES; i++) column_inverse[j + i] = inverse_length(squares[i]);
    }
  }

  const float* token(int64_t n, float* room) const { return m.x.row(0, b, n, m.channels, room); }

  static float inverse_length(float squares) {
    const float length = std::sqrt(squares);
    return 1 / (length < 1e-8f ? 1e-8f : length);
  }

  struct ScoresStep {
    const Image& image;
    const float* rows[ROWS];
    float emphasis[ROWS], inverse[ROWS];
    float* to;

    void measure() {
      const int64_t channels = image.m.channels;
      vec squares[ROWS] = {};
      int64_t c = 0;
      for (; c + LANES <= channels; c += LANES)
        for (int r = 0; r < ROWS; r++) squares[r] += load(rows[r] + c) * load(rows[r] + c);
      sum_of(squares, inverse);
      for (int r = 0; r < ROWS; r++) {
        for (int64_t d = c; d < channels; d++) inverse[r] += rows[r][d] * rows[r][d];
        inverse[r] = inverse_length(inverse[r]);
      }
    }

    template <int V>
    void run(int64_t j) {
      const Matching& m = image.m;
      vec sums[ROWS][V];
      if (m.tau_sim) multiply(rows, image.columns + j, image.wide, m.channels, sums);
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < V; v++) {
          const int64_t column = j + v * LANES;
          vec score = load(image.column_emphasis + column) * emphasis[r];
          if (m.tau_sim) score *= similarity(sums[r][v] * (load(image.column_inverse + column) * inverse[r]), m.tau_sim);
          store(to + r * image.wide + column, score);
        }
    }

    // Up to a factor, which no choice depends on.
    static vec similarity(vec cosine, float tau) {
      if (tau == 1) return cosine + 1;
      vec s = higher((cosine + 1) / 2, vec{});
      for (int i = 0; i < LANES; i++) s[i] = std::pow(s[i], 1 / tau);
      return s;
    }
  };

  // Rows from `begin` to `end` of the scores; `few`: room for ROWS of them.
  void score(int64_t begin, int64_t end, float* scores, float* few) const {
    for (int64_t i = begin; i < end; i += ROWS) {
      const int count = std::min<int64_t>(ROWS, end - i);
      float* const to = scores + i * wide;
      ScoresStep step{*this, {}, {}, {}, count == ROWS ? to : few};
      for (int r = 0; r < ROWS; r++) {
        const int64_t n = m.first() + 2 * (i + std::min(r, count - 1));
        if (m.tau_sim) step.rows[r] = token(n, rows + r * m.channels);
        step.emphasis[r] = emphasis[n];
      }
      if (m.tau_sim) step.measure();
      for_columns(wide, step);
      if (step.to == few) memcpy(to, few, count * wide * sizeof(float));
      for (int r = 0; r < count; r++) std::fill(to + r * wide + m.columns(), to + (r + 1) * wide, -INFINITY);
    }
  }
};

// A NaN is the highest score, as for torch.max and torch.sort.
static inline bool above(float a, float b) { return a > b || (a != a && b == b); }
static inline ivec above(vec a, vec b) { return (a > b) | ((a != a) & (b == b)); }

// The highest score of a row; `column`: the first one that has it.
static float best_of_row(const float* scores, int64_t wide, int& column) {
  vec peaks = all(-INFINITY);
  for (int64_t j = 0; j < wide; j += LANES) {
    const vec x = load(scores + j);
    peaks = above(x, peaks) ? x : peaks;
  }
  float best = -INFINITY;
  for (int i = 0; i < LANES; i++)
    if (above(peaks[i], best)) best = peaks[i];
  column = 0;
  while (above(best, scores[column])) column++;
  return best;
}

// For every column the highest score in `rows`, and the first of them that has it.
static void best_of_columns(
    const float* scores, int64_t wide, const std::vector<int>& rows, std::vector<float>& best, std::vector<int>& row) {
  best.assign(wide, -INFINITY);
  row.assign(wide, rows.empty() ? 0 : rows[0]);
  for (int i : rows)
    for (int64_t j = 0; j < wide; j += LANES) {
      memory_ivec* const so_far = (memory_ivec*)&row[j];
      const vec x = load(scores + i * wide + j), before = load(&best[j]);
      const ivec wins = above(x, before);
      store(&best[j], wins ? x : before);
      *so_far = wins ? ivec{} + i : (ivec)*so_far;
    }
}

// 0, 1, ... with those of the highest scores first; of equal scores the lower number.
static std::vector<int> by_score(const std::vector<float>& scores, int64_t count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return above(scores[i], scores[j]); });
  return order;
}

// One image's keep [N - r], gone [r] and into [r].
static void assign(const Matching& m, const float* scores, int64_t* keep, int64_t* gone, int64_t* into) {
  const int64_t kept = m.tokens - m.leaving, *const all_kept = keep, *const all_gone = gone;
  const int64_t wide = m.wide(), rows_leaving = m.bidirectional ? m.leaving / 2 : m.leaving;

  std::vector<float> best(m.rows());
  std::vector<int> column(m.rows());
  for (int64_t i = 0; i < m.rows(); i++) best[i] = best_of_row(scores + i * wide, wide, column[i]);
  std::vector<int> rows = by_score(best, m.rows());
  std::vector<int64_t> target;  // the old position that each of `gone` goes into
  for (int64_t i = 0; i < rows_leaving; i++) {
    *gone++ = m.first() + 2 * rows[i];
    target.push_back(m.second() + 2 * column[rows[i]]);
  }
  rows.erase(rows.begin(), rows.begin() + rows_leaving);
  if (m.lead || m.tail) std::sort(rows.begin(), rows.end());

  for (int64_t i = 0; i < m.lead; i++) *keep++ = i;
  for (int i : rows) *keep++ = m.first() + 2 * i;
  if (m.bidirectional) {
    std::vector<int> row;
    best_of_columns(scores, wide, rows, best, row);
    const std::vector<int> columns = by_score(best, m.columns());
    for (int64_t i = 0; i < m.columns(); i++) {
      const int64_t position = m.second() + 2 * columns[i];
      if (i >= m.leaving - rows_leaving) *keep++ = position;
      else {
        *gone++ = position;
        target.push_back(m.first() + 2 * row[columns[i]]);
      }
    }
  } else
    for (int64_t j = m.second(); j < m.tokens - m.tail; j += 2) *keep++ = j;
  for (int64_t i = m.tokens - m.tail; i < m.tokens; i++) *keep++ = i;

  std::vector<int64_t> place(m.tokens);
  for (int64_t i = 0; i < kept; i++) place[all_kept[i]] = i;
  // The last to leave first: one that left in the second pass has passed on what it had received.
  for (int64_t i = m.leaving; i-- > 0;) place[all_gone[i]] = into[i] = place[target[i]];
}

static std::tuple<Tensor, Tensor, Tensor> match(
    Tensor x, optional<Tensor> importance, Tensor size, int64_t left, int64_t lead, int64_t tail, double tau_sim,
    double tau_info, double tau_size, bool bidirectional) {
  const int64_t n = x.size(1), batch = x.size(0), r = n - left;
  STD_TORCH_CHECK(0 <= r && 2 * r <= std::max<int64_t>(n - lead - tail, 0), "match: r=", r, " of ", n,
                  " tokens is out of range");
  const auto int64 = torch::headeronly::ScalarType::Long;
  Tensor keep = torch::stable::new_empty(x, {batch, n - r}, int64);
  Tensor gone = torch::stable::new_empty(x, {batch, r}, int64);
  Tensor into = torch::stable::new_empty(x, {batch, r}, int64);
  int64_t *const kept = (int64_t*)keep.mutable_data_ptr(), *const away = (int64_t*)gone.mutable_data_ptr();
  int64_t* const groups = (int64_t*)into.mutable_data_ptr();
  if (!r) {
    for (int64_t b = 0; b < batch; b++) std::iota(kept + b * n, kept + (b + 1) * n, 0);
    return {keep, gone, into};
  }

  const Matching m{batch, n, x.size(2), r, lead, tail, (float)tau_sim, (float)tau_info, (float)tau_size, bidirectional,
                   Operand(x), importance ? PerToken<float>(*importance) : PerToken<float>(), PerToken<float>(size)};
  const int64_t wide = m.wide(), parts = parts_of(m.rows(), batch), length = (m.rows() + parts - 1) / parts;
  // Scores of the images, then rows that are being made.
  Tensor scratch = torch::stable::new_empty(x, {batch * (m.rows() + parts * ROWS) * wide},
                                            torch::headeronly::ScalarType::Float);
  float *const scores = (float*)scratch.mutable_data_ptr(), *const few = scores + batch * m.rows() * wide;
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / parts, row = std::min(i % parts * length, m.rows());
      const Image image(m, b);
      image.score(row, std::min(row + length, m.rows()), scores + b * m.rows() * wide, few + i * ROWS * wide);
    }
  });
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      assign(m, scores + b * m.rows() * wide, kept + b * (n - r), away + b * r, groups + b * r);
  });
  return {keep, gone, into};
}

STABLE_TORCH_LIBRARY_IMPL(mctf, CPU, library) { library.impl("match_cpp", TORCH_BOX(&match)); }
