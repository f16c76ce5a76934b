// Which tokens leave, by the scores of their pairs: torch.ops.mctf.assign, image by image.

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

using torch::stable::Tensor;

typedef int32_t memory_ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct Matching {
  int64_t alpha, beta, tokens, leaving, lead, tail;
  bool bidirectional;
};

// A NaN is the highest score, as for torch.max and torch.sort.
static inline bool above(float a, float b) { return a > b || (a != a && b == b); }
static inline ivec above(vec a, vec b) { return (a > b) | ((a != a) & (b == b)); }

// The highest score of a row; `column`: the first one that has it.
static float best_of_row(const float* scores, int64_t columns, int& column) {
  vec peaks = all(-INFINITY);
  int64_t j = 0;
  for (; j + LANES <= columns; j += LANES) {
    const vec x = load(scores + j);
    peaks = above(x, peaks) ? x : peaks;
  }
  float best = -INFINITY;
  for (int i = 0; i < LANES; i++)
    if (above(peaks[i], best)) best = peaks[i];
  for (; j < columns; j++)
    if (above(scores[j], best)) best = scores[j];
  column = 0;
  while (above(best, scores[column])) column++;
  return best;
}

// For every column the highest score in `rows`, and the first of them that has it.
static void best_of_columns(
    const float* scores, int64_t columns, const std::vector<int>& rows, std::vector<float>& best, std::vector<int>& row) {
  best.assign(columns, -INFINITY);
  row.assign(columns, rows.empty() ? 0 : rows[0]);
  for (int i : rows) {
    const float* x = scores + i * columns;
    int64_t j = 0;
    for (; j + LANES <= columns; j += LANES) {
      memory_ivec* const rows_so_far = (memory_ivec*)&row[j];
      const ivec wins = above(load(x + j), load(&best[j]));
      store(&best[j], wins ? load(x + j) : load(&best[j]));
      *rows_so_far = wins ? ivec{} + i : (ivec)*rows_so_far;
    }
    for (; j < columns; j++)
      if (above(x[j], best[j])) best[j] = x[j], row[j] = i;
  }
}

// 0, 1, ... with those of the highest scores first; of equal scores the lower number.
static std::vector<int> by_score(const std::vector<float>& scores) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return above(scores[i], scores[j]); });
  return order;
}

// One image: keep [N - r], gone [r] and into [r], of scores [alpha, beta].
static void assign_image(const Matching& m, const float* scores, int64_t* keep, int64_t* gone, int64_t* into) {
  const int64_t kept = m.tokens - m.leaving, *const all_kept = keep, *const all_gone = gone;
  const int64_t first = m.lead + m.lead % 2, second = m.lead + 1 - m.lead % 2;
  const int64_t rows_leaving = m.bidirectional ? m.leaving / 2 : m.leaving;

  std::vector<float> best(m.alpha);
  std::vector<int> column(m.alpha);
  for (int64_t i = 0; i < m.alpha; i++) best[i] = best_of_row(scores + i * m.beta, m.beta, column[i]);
  std::vector<int> rows = by_score(best);
  std::vector<int64_t> target;  // the old position that each of `gone` goes into
  for (int64_t i = 0; i < rows_leaving; i++) {
    *gone++ = first + 2 * rows[i];
    target.push_back(second + 2 * column[rows[i]]);
  }
  rows.erase(rows.begin(), rows.begin() + rows_leaving);
  if (m.lead || m.tail) std::sort(rows.begin(), rows.end());

  for (int64_t i = 0; i < m.lead; i++) *keep++ = i;
  for (int i : rows) *keep++ = first + 2 * i;
  if (m.bidirectional) {
    std::vector<int> row;
    best_of_columns(scores, m.beta, rows, best, row);
    const std::vector<int> columns = by_score(best);
    for (int64_t i = 0; i < m.beta; i++) {
      const int64_t position = second + 2 * columns[i];
      if (i >= m.leaving - rows_leaving) *keep++ = position;
      else {
        *gone++ = position;
        target.push_back(first + 2 * row[columns[i]]);
      }
    }
  } else
    for (int64_t j = second; j < m.tokens - m.tail; j += 2) *keep++ = j;
  for (int64_t i = m.tokens - m.tail; i < m.tokens; i++) *keep++ = i;

  std::vector<int64_t> place(m.tokens);
  for (int64_t i = 0; i < kept; i++) place[all_kept[i]] = i;
  // The last to leave first: one that left in the second pass has passed on what it had received.
  for (int64_t i = m.leaving; i-- > 0;) place[all_gone[i]] = into[i] = place[target[i]];
}

static std::tuple<Tensor, Tensor, Tensor> assign(
    Tensor scores, int64_t n, int64_t r, int64_t lead, int64_t tail, bool bidirectional) {
  STD_TORCH_CHECK(0 <= r && 2 * r <= std::max<int64_t>(n - lead - tail, 0), "match: r=", r, " of ", n,
                  " tokens is out of range");
  scores = torch::stable::contiguous(scores);
  const Matching m{scores.size(1), scores.size(2), n, r, lead, tail, bidirectional};
  const int64_t batch = scores.size(0);
  const auto int64 = torch::headeronly::ScalarType::Long;
  Tensor keep = torch::stable::new_empty(scores, {batch, n - r}, int64);
  Tensor gone = torch::stable::new_empty(scores, {batch, r}, int64);
  Tensor into = torch::stable::new_empty(scores, {batch, r}, int64);
  const float* const from = (const float*)scores.data_ptr();
  int64_t *const kept = (int64_t*)keep.mutable_data_ptr(), *const left = (int64_t*)gone.mutable_data_ptr();
  int64_t* const groups = (int64_t*)into.mutable_data_ptr();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      if (r) assign_image(m, from + b * m.alpha * m.beta, kept + b * (n - r), left + b * r, groups + b * r);
      else std::iota(kept + b * n, kept + (b + 1) * n, 0);
    }
  });
  return {keep, gone, into};
}

STABLE_TORCH_LIBRARY_IMPL(mctf, CPU, library) { library.impl("assign_cpp", TORCH_BOX(&assign)); }
