// From a matching to fused tokens: torch.ops.mctf.group, and torch.ops.mctf.pool of rows of channels.

// A matching of each image: keep [B, M], gone [B, r] and into [B, r].
struct Groups {
  int64_t batch, kept, left;
  PerToken<int64_t> keep, gone, into;

  // `of`: [B, N], what the positions number.
  Groups(const Tensor& keep, const Tensor& gone, const Tensor& into, const Tensor& of)
      : batch(keep.size(0)), kept(keep.size(1)), left(gone.size(1)), keep(keep), gone(gone), into(into) {
    const int64_t tokens = of.size(1);
    STD_TORCH_CHECK(of.size(0) == batch, "a matching of ", batch, " images for ", of.size(0));
    for (int64_t b = 0; b < batch; b++) {
      for (int64_t m = 0; m < kept; m++) check(this->keep(b, m), tokens);
      for (int64_t i = 0; i < left; i++) {
        check(this->gone(b, i), tokens);
        check(this->into(b, i), kept);
      }
    }
  }

  static void check(int64_t position, int64_t count) {
    STD_TORCH_CHECK(0 <= position && position < count, "a matching has position ", position, " of ", count);
  }
};

static std::tuple<Tensor, Tensor, Tensor> group(Tensor raw, Tensor size, Tensor keep, Tensor gone, Tensor into) {
  const int64_t tokens = raw.size(1);
  const Groups g(keep, gone, into, raw);
  Tensor index = torch::stable::new_empty(keep, {g.batch, tokens});
  Tensor weight = torch::stable::new_empty(raw, {g.batch, tokens});
  Tensor sums = torch::stable::new_empty(size, {g.batch, g.kept});
  const PerToken<float> raw_of(raw), size_of(size);
  std::vector<float> totals(g.kept);
  for (int64_t b = 0; b < g.batch; b++) {
    int64_t* const place = (int64_t*)index.mutable_data_ptr() + b * tokens;
    float* const share = (float*)weight.mutable_data_ptr() + b * tokens;
    float* const sum = (float*)sums.mutable_data_ptr() + b * g.kept;
    std::fill(place, place + tokens, 0);
    // Attention can underflow for every token of a group, which has a mean nevertheless. A NaN stays.
    const auto floored = [&](int64_t n) {
      const float x = raw_of(b, n);
      return x < 1.17549435e-38f ? 1.17549435e-38f : x;
    };
    for (int64_t m = 0; m < g.kept; m++) {
      const int64_t n = g.keep(b, m);
      place[n] = m;
      totals[m] = floored(n);
      sum[m] = size_of(b, n);
    }
    for (int64_t i = 0; i < g.left; i++) {
      const int64_t n = g.gone(b, i), m = g.into(b, i);
      place[n] = m;
      totals[m] += floored(n);
      sum[m] += size_of(b, n);
    }
    for (int64_t n = 0; n < tokens; n++) share[n] = floored(n) / totals[place[n]];
  }
  return {index, weight, sums};
}

// [B, N, C] or [B, P, N, C], weighted and summed in float32 and rounded once.
static Tensor pool(Tensor x, Tensor weight, Tensor keep, Tensor gone, Tensor into, int64_t dim) {
  const Groups g(keep, gone, into, weight);
  STD_TORCH_CHECK(x.size(0) == g.batch && x.size(dim) == weight.size(1), "pool: weights of ", weight.size(0), " x ",
                  weight.size(1), " tokens for ", x.size(0), " x ", x.size(dim));
  const Operand tokens(x);
  const PerToken<float> weight_of(weight);
  const int64_t planes = dim == 1 ? 1 : x.size(1), channels = x.size(dim + 1);
  const int64_t parts = parts_of(g.kept, g.batch * planes), length = (g.kept + parts - 1) / parts;
  std::vector<int64_t> shape{g.batch};
  if (dim == 2) shape.push_back(planes);
  shape.insert(shape.end(), {g.kept, channels});
  Tensor pooled = torch::stable::new_empty(x, shape);
  char* const out = (char*)pooled.mutable_data_ptr();
  const int64_t bytes = tokens.bfloat16 ? 2 : 4;
  torch::stable::parallel_for(0, g.batch * planes * parts, 1, [&](int64_t begin, int64_t end) {
    // The other members of each token, as lists: the first of each, and the next of each.
    std::vector<int64_t> first(g.kept), next(g.left);
    std::vector<float> row(channels), sum(channels);
    for (int64_t task = begin; task < end; task++) {
      const int64_t plane = task / parts, b = plane / planes;
      const int64_t from = task % parts * length, to = std::min(from + length, g.kept);
      std::fill(first.begin(), first.end(), -1);
      for (int64_t i = g.left; i-- > 0;) {
        next[i] = first[g.into(b, i)];
        first[g.into(b, i)] = i;
      }
      const auto add = [&](int64_t n, bool more) {
        const float w = weight_of(b, n);
        if (dim == 1) tokens.read_row(0, b, n, channels, row.data());
        else tokens.read_row(b, plane % planes, n, channels, row.data());
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES)
          store(&sum[c], load(&row[c]) * w + (more ? load(&sum[c]) : vec{}));
        for (; c < channels; c++) sum[c] = row[c] * w + (more ? sum[c] : 0);
      };
      for (int64_t m = from; m < to; m++) {
        add(g.keep(b, m), false);
        for (int64_t i = first[m]; i >= 0; i = next[i]) add(g.gone(b, i), true);
        char* const at = out + (plane * g.kept + m) * channels * bytes;
        if (tokens.bfloat16) narrow(sum.data(), channels, (uint16_t*)at);
        else memcpy(at, sum.data(), channels * sizeof(float));
      }
    }
  });
  return pooled;
}

STABLE_TORCH_LIBRARY_IMPL(mctf, CPU, library) {
  library.impl("group_cpp", TORCH_BOX(&group));
  library.impl("pool_cpp", TORCH_BOX(&pool));
}
