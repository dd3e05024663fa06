// What Visual-Contrast Attention does between its projections, and its gradients, for a CPU (arXiv 2511.00833, section 3):
// the two stages, how their result is joined with the convolution of the values, and all of it in one.
//
// The functions at the end are those of vca.kernels.ops, by the same names, with the same shapes: what has the length of the
// sequence is a view (B, H, T, d), what has the length of the contrast tokens is (BH, 2 * n, d) or (BH, n, d). d is a
// multiple of 16. They compute in float32 whatever type they are given.
//
// Threads share the heads. A head's sequence is walked through in tiles of 64 tokens, whose scores lie transposed: a
// row for each contrast token, so that a vector holds neighbouring tokens and a softmax over contrast tokens needs no
// sums within a vector. Everything of a tile stays in the first two caches.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>  // not torch/extension.h, which takes twice as long to compile

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

// Numbers in a vector, and vectors in a row of a block of a product; 6 rows of them fill the registers.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16, BLOCK = 4;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8, BLOCK = 2;
#else
constexpr int64_t WIDTH = 4, BLOCK = 4;
#endif
constexpr int64_t TILE = 64;
constexpr int64_t CHUNK = 4 * TILE;  // tokens between two corrections of the running maximum in Stage I
constexpr float RMS_EPS = 1e-5f;

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * WIDTH)));

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += x[i];
  return total;
}

inline float largest(Vec x) {
  float found = x[0];
  for (int i = 1; i < WIDTH; i++) found = std::max(found, x[i]);
  return found;
}

// exp(x) of x <= 0 to about 2e-7 of its value: 2^round(x / ln 2) times a Taylor polynomial. Below -87 it is exp(-87);
// NaN stays NaN.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  Vec rounded = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23, beside which no fraction has a place
  Vec power = rounded - 12582912.0f;
  Vec rest = x - power * 0.693145752f - power * 1.42860677e-6f;  // ln 2 in two parts
  Vec y = Vec{} + 1.0f / 720;
  for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * rest + coefficient;
  IntVec exponent;
  std::memcpy(&exponent, &rounded, sizeof(exponent));
  exponent = (exponent + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return y * scale;
}

// A matrix that is read entry by entry, with any strides.
struct Entries {
  const float* data;
  int64_t row, column;
};

// c (ROWS, VECS * WIDTH) = a b, or c += a b; k is the length of the sums.
template <int ROWS, int VECS>
inline void multiply_block(int64_t k, Entries a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  Vec total[ROWS][VECS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECS; j++) total[i][j] = add ? load(c + i * c_row + j * WIDTH) : Vec{};
  for (int64_t l = 0; l < k; l++) {
    Vec row[VECS];
    for (int j = 0; j < VECS; j++) row[j] = load(b + l * b_row + j * WIDTH);
    for (int i = 0; i < ROWS; i++) {
      float factor = a.data[i * a.row + l * a.column];
      for (int j = 0; j < VECS; j++) total[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECS; j++) store(c + i * c_row + j * WIDTH, total[i][j]);
}

template <int VECS>
inline void multiply_columns(int64_t rows, int64_t k, Entries a, const float* b, int64_t b_row, float* c, int64_t c_row,
                             bool add) {
  for (; rows >= 6; rows -= 6, a.data += 6 * a.row, c += 6 * c_row)
    multiply_block<6, VECS>(k, a, b, b_row, c, c_row, add);
  switch (rows) {
    case 5:
      return multiply_block<5, VECS>(k, a, b, b_row, c, c_row, add);
    case 4:
      return multiply_block<4, VECS>(k, a, b, b_row, c, c_row, add);
    case 3:
      return multiply_block<3, VECS>(k, a, b, b_row, c, c_row, add);
    case 2:
      return multiply_block<2, VECS>(k, a, b, b_row, c, c_row, add);
    case 1:
      return multiply_block<1, VECS>(k, a, b, b_row, c, c_row, add);
  }
}

// c (rows, columns) = a b, or c += a b, of a (rows, k) and b (k, columns); columns is a multiple of WIDTH.
void multiply(int64_t rows, int64_t columns, int64_t k, Entries a, const float* b, int64_t b_row, float* c,
              int64_t c_row, bool add = false) {
  for (; columns >= BLOCK * WIDTH; columns -= BLOCK * WIDTH, b += BLOCK * WIDTH, c += BLOCK * WIDTH)
    multiply_columns<BLOCK>(rows, k, a, b, b_row, c, c_row, add);
  for (; columns > 0; columns -= WIDTH, b += WIDTH, c += WIDTH)
    multiply_columns<1>(rows, k, a, b, b_row, c, c_row, add);
}

// to (d, TILE) = the transpose of x (count, d), count <= TILE; the columns up to the next whole vector become 0.
void transpose(const float* x, int64_t x_row, int64_t count, int64_t d, float* to) {
  for (int64_t start = 0; start < count; start += WIDTH)
    for (int64_t channel = 0; channel < d; channel++) {
      Vec column{};
      const float* from = x + start * x_row + channel;
      if (start + WIDTH <= count)
        for (int i = 0; i < WIDTH; i++) column[i] = from[i * x_row];
      else
        for (int i = 0; i < count - start; i++) column[i] = from[i * x_row];
      store(to + channel * TILE + start, column);
    }
}

int64_t whole_vectors(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

// c (rows, count) = a x^T, of a (rows, d) and x (count, d), count <= TILE; `transposed` (d, TILE) is room for x^T.
void multiply_transposed(int64_t rows, int64_t count, int64_t d, Entries a, const float* x, int64_t x_row,
                         std::vector<float>& transposed, float* c, int64_t c_row) {
  transpose(x, x_row, count, d, transposed.data());
  multiply(rows, whole_vectors(count), d, a, transposed.data(), TILE, c, c_row);
}

float dot(const float* a, const float* b, int64_t d) {
  Vec total{};
  for (int64_t i = 0; i < d; i += WIDTH) total += load(a + i) * load(b + i);
  return sum(total);
}

float rms_scale(const float* x, int64_t d, float gain) { return gain / std::sqrt(dot(x, x, d) / d + RMS_EPS); }

// x of rms_scale(x) x, in place.
void rms_norm(float* x, int64_t d, float gain) {
  float scale = rms_scale(x, d, gain);
  for (int64_t i = 0; i < d; i += WIDTH) store(x + i, load(x + i) * scale);
}

// to = the gradient of x in rms_scale(x) x.
void rms_backward(const float* grad, const float* x, int64_t d, float gain, float* to) {
  float scale = rms_scale(x, d, gain);
  float along = scale * scale / (gain * gain * d) * dot(grad, x, d);
  for (int64_t i = 0; i < d; i += WIDTH) store(to + i, scale * (load(grad + i) - along * load(x + i)));
}

// A view (B, H, T, d), by its heads.
struct Sequence {
  float* data;
  int64_t batch, head, token, heads;

  explicit Sequence(const Tensor& x)
      : data(x.data_ptr<float>()), batch(x.stride(0)), head(x.stride(1)), token(x.stride(2)), heads(x.size(1)) {}

  float* at(int64_t group, int64_t index) const {
    return data + group / heads * batch + group % heads * head + index * token;
  }
};

// BH, n, d and T.
std::tuple<int64_t, int64_t, int64_t, int64_t> sizes(const Tensor& tokens, const Tensor& x) {
  TORCH_CHECK(tokens.size(2) % 16 == 0, "a head needs a multiple of 16 channels, not ", tokens.size(2));
  return {tokens.size(0), tokens.size(1) / 2, tokens.size(2), x.size(2)};
}

Tensor dense(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

Tensor with_adjacent_channels(const Tensor& x) {
  Tensor y = x.to(at::kFloat);
  return y.stride(-1) == 1 ? y : y.contiguous();
}

float* start_of(Tensor& x) { return x.data_ptr<float>(); }

// In the memory order (B, T, H, d), in which a layer joins its heads.
Tensor empty_sequence(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

// Replaces whole vectors of a row of scores by exp(score - shift), of which it returns the sum.
float exponentials(float* scores, int64_t count, float shift) {
  Vec total{};
  for (int64_t i = 0; i < count; i += WIDTH) {
    Vec weights = exponential(load(scores + i) - shift);
    store(scores + i, weights);
    total += weights;
  }
  return sum(total);
}

float largest(const float* scores, int64_t count) {
  Vec found = Vec{} - std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; i += WIDTH) found = maximum(found, load(scores + i));
  return largest(found);
}

std::tuple<Tensor, Tensor, Tensor> stage1(Tensor tokens, Tensor k, Tensor v, Tensor lam, double gain) {
  const auto type = tokens.scalar_type();
  tokens = with_adjacent_channels(tokens), k = with_adjacent_channels(k), v = with_adjacent_channels(v);
  int64_t groups, n, d, length;
  std::tie(groups, n, d, length) = sizes(tokens, k);
  Tensor out = at::empty({groups, n, d}, tokens.options());
  Tensor products = at::empty({groups, 2 * n, d}, tokens.options());
  Tensor norms = at::empty({2, groups, 2 * n}, tokens.options());  // the maxima of the scores, the sums of the softmax
  const Sequence keys(k), values(v);
  const float lambda = lam.item<float>();
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> transposed(d * TILE), scores(2 * n * CHUNK), shift(2 * n), total(2 * n);
    for (int64_t group = begin; group < end; group++) {
      const float* t = start_of(tokens) + group * tokens.stride(0);
      float* product = start_of(products) + group * 2 * n * d;
      for (int64_t start = 0; start < length; start += CHUNK) {
        const int64_t count = std::min(CHUNK, length - start);
        for (int64_t tile = 0; tile < count; tile += TILE) {
          const int64_t inside = std::min(TILE, count - tile);
          multiply_transposed(2 * n, inside, d, {t, tokens.stride(1), 1}, keys.at(group, start + tile), keys.token,
                              transposed, scores.data() + tile, CHUNK);
        }
        for (int64_t row = 0; row < 2 * n; row++) {
          float* line = scores.data() + row * CHUNK;
          for (int64_t i = count; i < whole_vectors(count); i++) line[i] = -std::numeric_limits<float>::infinity();
          const float higher = start ? std::max(shift[row], largest(line, count)) : largest(line, count);
          const float found = exponentials(line, count, higher);
          if (start) {
            const float decay = std::exp(shift[row] - higher);
            total[row] = total[row] * decay + found;
            for (int64_t i = 0; i < d; i += WIDTH) store(product + row * d + i, load(product + row * d + i) * decay);
          } else {
            total[row] = found;
          }
          shift[row] = higher;
        }
        multiply(2 * n, d, count, {scores.data(), CHUNK, 1}, values.at(group, start), values.token, product, d,
                 start > 0);
      }
      float* result = start_of(out) + group * n * d;
      for (int64_t row = 0; row < 2 * n; row++) {
        for (int64_t i = 0; i < d; i += WIDTH) store(product + row * d + i, load(product + row * d + i) / total[row]);
        start_of(norms)[group * 2 * n + row] = shift[row];
        start_of(norms)[(groups + group) * 2 * n + row] = total[row];
      }
      for (int64_t row = 0; row < n; row++) {
        for (int64_t i = row * d; i < (row + 1) * d; i += WIDTH)
          store(result + i, load(product + i) - lambda * load(product + n * d + i));
        rms_norm(result + row * d, d, gain);
      }
    }
  });
  return {out.to(type), products, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stage1_backward(Tensor grad, Tensor tokens, Tensor k, Tensor v, Tensor lam,
                                                           double gain, Tensor products, Tensor norms) {
  const auto type = tokens.scalar_type();
  grad = dense(grad), tokens = with_adjacent_channels(tokens), k = with_adjacent_channels(k),
  v = with_adjacent_channels(v);
  int64_t groups, n, d, length;
  std::tie(groups, n, d, length) = sizes(tokens, k);
  Tensor grad_tokens = at::empty({groups, 2 * n, d}, tokens.options());
  Tensor grad_k = empty_sequence(k), grad_v = empty_sequence(v), grad_lam = at::empty({groups}, lam.options());
  const Sequence keys(k), values(v), grad_keys(grad_k), grad_values(grad_v);
  const float lambda = lam.item<float>();
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> transposed(d * TILE), maps(2 * n * TILE), grad_map(n * TILE), difference(n * TILE);
    std::vector<float> inner(n * d), mean(2 * n);  // inner: the gradient before the RMSNorm
    for (int64_t group = begin; group < end; group++) {
      const float* t = start_of(tokens) + group * tokens.stride(0);
      const float* product = start_of(products) + group * 2 * n * d;
      const float* shift = start_of(norms) + group * 2 * n;
      const float* total = shift + groups * 2 * n;
      float* grad_t = start_of(grad_tokens) + group * 2 * n * d;
      float total_lam = 0;
      for (int64_t row = 0; row < n; row++) {
        float *to = inner.data() + row * d, *before = transposed.data();
        for (int64_t i = 0; i < d; i += WIDTH)
          store(before + i, load(product + row * d + i) - lambda * load(product + (n + row) * d + i));
        rms_backward(start_of(grad) + (group * n + row) * d, before, d, gain, to);
        mean[row] = dot(to, product + row * d, d);  // of the map's gradient, weighted by the map
        mean[n + row] = dot(to, product + (n + row) * d, d);
        total_lam -= mean[n + row];
      }
      start_of(grad_lam)[group] = total_lam;
      for (int64_t start = 0; start < length; start += TILE) {
        const int64_t count = std::min(TILE, length - start);
        const float* key = keys.at(group, start);
        multiply_transposed(n, count, d, {inner.data(), d, 1}, values.at(group, start), values.token, transposed,
                            grad_map.data(), TILE);
        multiply_transposed(2 * n, count, d, {t, tokens.stride(1), 1}, key, keys.token, transposed, maps.data(), TILE);
        for (int64_t row = 0; row < n; row++) {
          const float positive_scale = 1 / total[row], negative_scale = lambda / total[n + row];
          for (int64_t i = row * TILE; i < row * TILE + count; i += WIDTH) {
            const Vec positive = positive_scale * exponential(load(maps.data() + i) - shift[row]);
            const Vec negative = negative_scale * exponential(load(maps.data() + n * TILE + i) - shift[n + row]);
            const Vec above = load(grad_map.data() + i);
            store(difference.data() + i, positive - negative);
            store(maps.data() + i, positive * (above - mean[row]));
            store(maps.data() + n * TILE + i, negative * (mean[n + row] - above));
          }
        }
        multiply(count, d, n, {difference.data(), 1, TILE}, inner.data(), d, grad_values.at(group, start),
                 grad_values.token);
        multiply(count, d, 2 * n, {maps.data(), 1, TILE}, t, tokens.stride(1), grad_keys.at(group, start),
                 grad_keys.token);
        multiply(2 * n, d, count, {maps.data(), TILE, 1}, key, keys.token, grad_t, d, start > 0);
      }
    }
  });
  return {grad_tokens.to(type), grad_k.to(type), grad_v.to(type), grad_lam.sum()};
}

// Replaces the scores of both streams (2 * n, TILE) by their softmax over n, for `count` tokens.
void softmax_over_tokens(float* scores, int64_t n, int64_t count) {
  for (int64_t start = 0; start < count; start += WIDTH)
    for (float* stream = scores + start; stream < scores + 2 * n * TILE; stream += n * TILE) {
      Vec highest = load(stream);
      for (int64_t row = 1; row < n; row++) highest = maximum(highest, load(stream + row * TILE));
      Vec total{};
      for (int64_t row = 0; row < n; row++) {
        Vec weights = exponential(load(stream + row * TILE) - highest);
        store(stream + row * TILE, weights);
        total += weights;
      }
      const Vec factor = 1.0f / total;
      for (int64_t row = 0; row < n; row++) store(stream + row * TILE, load(stream + row * TILE) * factor);
    }
}

// to = A+ - lambda A- of the maps of both streams (2 * n, TILE).
void subtract_streams(const float* maps, float lambda, int64_t n, int64_t count, float* to) {
  for (int64_t row = 0; row < n * TILE; row += TILE)
    for (int64_t i = row; i < row + count; i += WIDTH)
      store(to + i, load(maps + i) - lambda * load(maps + n * TILE + i));
}

Tensor stage2(Tensor tokens, Tensor q, Tensor values, Tensor lam, double gain) {
  const auto type = tokens.scalar_type();
  tokens = with_adjacent_channels(tokens), q = with_adjacent_channels(q), values = dense(values);
  int64_t groups, n, d, length;
  std::tie(groups, n, d, length) = sizes(tokens, q);
  Tensor out = empty_sequence(q);
  const Sequence queries(q), outputs(out);
  const float lambda = lam.item<float>();
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> transposed(d * TILE), maps(2 * n * TILE);
    for (int64_t group = begin; group < end; group++)
      for (int64_t start = 0; start < length; start += TILE) {
        const int64_t count = std::min(TILE, length - start);
        const float* t = start_of(tokens) + group * tokens.stride(0);
        float* result = outputs.at(group, start);
        multiply_transposed(2 * n, count, d, {t, tokens.stride(1), 1}, queries.at(group, start), queries.token,
                            transposed, maps.data(), TILE);
        softmax_over_tokens(maps.data(), n, count);
        subtract_streams(maps.data(), lambda, n, count, maps.data());
        multiply(count, d, n, {maps.data(), 1, TILE}, start_of(values) + group * n * d, d, result, outputs.token);
        for (int64_t i = 0; i < count; i++) rms_norm(result + i * outputs.token, d, gain);
      }
  });
  return out.to(type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stage2_backward(Tensor grad, Tensor tokens, Tensor q, Tensor values,
                                                           Tensor lam, double gain) {
  const auto type = tokens.scalar_type();
  grad = with_adjacent_channels(grad), tokens = with_adjacent_channels(tokens), q = with_adjacent_channels(q),
  values = dense(values);
  int64_t groups, n, d, length;
  std::tie(groups, n, d, length) = sizes(tokens, q);
  Tensor grad_tokens = at::empty({groups, 2 * n, d}, tokens.options());
  Tensor grad_values = at::empty({groups, n, d}, tokens.options());
  Tensor grad_q = empty_sequence(q), grad_lam = at::empty({groups}, lam.options());
  const Sequence queries(q), grads(grad), grad_queries(grad_q);
  const float lambda = lam.item<float>();
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> transposed(d * TILE), maps(2 * n * TILE), grad_map(n * TILE), difference(n * TILE);
    std::vector<float> inner(TILE * d);  // what Stage II gives before its RMSNorm, then the gradient of that
    for (int64_t group = begin; group < end; group++) {
      const float* t = start_of(tokens) + group * tokens.stride(0);
      const float* value = start_of(values) + group * n * d;
      float* grad_t = start_of(grad_tokens) + group * 2 * n * d;
      Vec total_lam{};
      for (int64_t start = 0; start < length; start += TILE) {
        const int64_t count = std::min(TILE, length - start);
        const float* query = queries.at(group, start);
        multiply_transposed(2 * n, count, d, {t, tokens.stride(1), 1}, query, queries.token, transposed, maps.data(),
                            TILE);
        softmax_over_tokens(maps.data(), n, count);
        subtract_streams(maps.data(), lambda, n, count, difference.data());
        multiply(count, d, n, {difference.data(), 1, TILE}, value, d, inner.data(), d);
        for (int64_t i = 0; i < count; i++)
          rms_backward(grads.at(group, start + i), inner.data() + i * d, d, gain, inner.data() + i * d);
        multiply(n, d, count, {difference.data(), TILE, 1}, inner.data(), d, start_of(grad_values) + group * n * d, d,
                 start > 0);
        multiply_transposed(n, count, d, {value, d, 1}, inner.data(), d, transposed, grad_map.data(), TILE);
        for (int64_t i = 0; i < count; i += WIDTH) {
          Vec positive_mean{}, negative_mean{};
          for (int64_t at = i; at < n * TILE; at += TILE) {
            positive_mean += load(maps.data() + at) * load(grad_map.data() + at);
            negative_mean += load(maps.data() + n * TILE + at) * load(grad_map.data() + at);
          }
          total_lam -= negative_mean;
          for (int64_t at = i; at < n * TILE; at += TILE) {
            float *positive = maps.data() + at, *negative = maps.data() + n * TILE + at;
            const Vec above = load(grad_map.data() + at);
            store(positive, load(positive) * (above - positive_mean));
            store(negative, lambda * load(negative) * (negative_mean - above));
          }
        }
        multiply(count, d, 2 * n, {maps.data(), 1, TILE}, t, tokens.stride(1), grad_queries.at(group, start),
                 grad_queries.token);
        multiply(2 * n, d, count, {maps.data(), TILE, 1}, query, queries.token, grad_t, d, start > 0);
      }
      start_of(grad_lam)[group] = sum(total_lam);
    }
  });
  return {grad_tokens.to(type), grad_q.to(type), grad_values.to(type), grad_lam.sum()};
}

// Calls visit(token, window) of every patch: the numbers of it and its neighbours, row by row, in a vector of channels that
// begins at `channel`; 0 outside the grid. The patches follow `prefix` other tokens.
template <typename Visit>
inline void walk(const Sequence& x, int64_t group, int64_t channel, int64_t rows, int64_t columns, int64_t prefix,
                 Visit visit) {
  for (int64_t row = 0; row < rows; row++) {
    const bool inside[3] = {row > 0, true, row + 1 < rows};
    Vec window[9] = {};
    const auto shift_in = [&](int64_t column) {
      for (int i = 0; i < 3; i++) {
        window[3 * i] = window[3 * i + 1], window[3 * i + 1] = window[3 * i + 2];
        window[3 * i + 2] = column < columns && inside[i]
                                ? load(x.at(group, prefix + (row + i - 1) * columns + column) + channel)
                                : Vec{};
      }
    };
    shift_in(0);
    for (int64_t column = 0; column < columns; column++) {
      shift_in(column + 1);
      visit(prefix + row * columns + column, window);
    }
  }
}

// What a layer joins: the values that its stages have gathered, times a gain of each channel of a head, plus the 3x3
// convolution of each channel of the patches' values on its own, with weights (C, 1, 3, 3).
Tensor join(Tensor gathered, Tensor v, Tensor gain, Tensor weight, Tensor bias, int64_t rows, int64_t columns,
            int64_t prefix) {
  const auto type = gathered.scalar_type();
  gathered = with_adjacent_channels(gathered), v = with_adjacent_channels(v);
  gain = dense(gain), weight = dense(weight.flatten(1).t()), bias = dense(bias);
  const int64_t heads = gathered.size(1), d = gathered.size(3);
  Tensor out = empty_sequence(gathered);
  const Sequence before(gathered), values(v), after(out);
  at::parallel_for(0, gathered.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      for (int64_t i = 0; i < d; i += WIDTH) {
        const int64_t channel = group % heads * d + i;
        const Vec scale = load(start_of(gain) + i), shift = load(start_of(bias) + channel);
        Vec weights[9];
        for (int place = 0; place < 9; place++) weights[place] = load(start_of(weight) + place * heads * d + channel);
        for (int64_t token = 0; token < prefix; token++)
          store(after.at(group, token) + i, load(before.at(group, token) + i) * scale);
        walk(values, group, i, rows, columns, prefix, [&](int64_t token, const Vec* window) {
          Vec total = load(before.at(group, token) + i) * scale + shift;
          for (int place = 0; place < 9; place++) total += weights[place] * window[place];
          store(after.at(group, token) + i, total);
        });
      }
  });
  return out.transpose(1, 2).flatten(2).to(type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> join_backward(Tensor grad, Tensor gathered, Tensor v, Tensor gain,
                                                                 Tensor weight, Tensor bias, int64_t rows,
                                                                 int64_t columns, int64_t prefix) {
  const int64_t heads = gathered.size(1), d = gathered.size(3), groups = gathered.size(0) * heads;
  Tensor grads = dense(grad).view({gathered.size(0), gathered.size(2), heads, d}).transpose(1, 2);
  Tensor inputs = with_adjacent_channels(gathered), contents = with_adjacent_channels(v);
  Tensor factors = dense(gain), filters = dense(weight.flatten(1).t());
  Tensor grad_gathered = empty_sequence(inputs), grad_v = empty_sequence(contents);
  Tensor sums = at::empty({11, groups, d}, inputs.options());  // the gradients of the 9 weights, the bias and the gain
  const Sequence above(grads), before(inputs), values(contents), grad_before(grad_gathered), grad_values(grad_v);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      for (int64_t i = 0; i < d; i += WIDTH) {
        const Vec scale = load(start_of(factors) + i);
        Vec weights[9], grad_weights[9] = {}, grad_bias{}, grad_gain{};
        for (int place = 0; place < 9; place++)
          weights[place] = load(start_of(filters) + (place * heads + group % heads) * d + i);
        for (int64_t token = 0; token < gathered.size(2); token++) {
          const Vec own = load(above.at(group, token) + i);
          store(grad_before.at(group, token) + i, own * scale);
          grad_gain += own * load(before.at(group, token) + i);
          if (token < prefix) store(grad_values.at(group, token) + i, Vec{});
        }
        walk(values, group, i, rows, columns, prefix, [&](int64_t token, const Vec* window) {
          const Vec own = load(above.at(group, token) + i);
          grad_bias += own;
          for (int place = 0; place < 9; place++) grad_weights[place] += own * window[place];
        });
        walk(above, group, i, rows, columns, prefix, [&](int64_t token, const Vec* window) {
          Vec total{};
          for (int place = 0; place < 9; place++) total += weights[8 - place] * window[place];
          store(grad_values.at(group, token) + i, total);
        });
        float* to = start_of(sums) + group * d + i;
        for (int place = 0; place < 9; place++) store(to + place * groups * d, grad_weights[place]);
        store(to + 9 * groups * d, grad_bias), store(to + 10 * groups * d, grad_gain);
      }
  });
  sums = sums.view({11, gathered.size(0), heads * d}).sum(1);  // (11, C)
  return {grad_gathered.to(gathered.scalar_type()), grad_v.to(v.scalar_type()),
          sums[10].view({heads, d}).sum(0).to(gain.scalar_type()),
          sums.slice(0, 0, 9).t().contiguous().view(weight.sizes()).to(weight.scalar_type()),
          sums[9].clone().to(bias.scalar_type())};
}

// exp(q1 . k1) - exp(q2 . k2) + init, of the vectors q1, k1, q2, k2.
Tensor contrast_lambda(const std::vector<Tensor>& vectors, double init) {
  float products[2];
  for (int i = 0; i < 2; i++) {
    Tensor q = dense(vectors[2 * i]), k = dense(vectors[2 * i + 1]);
    products[i] = dot(start_of(q), start_of(k), q.size(0));
  }
  return at::full({}, std::exp(products[0]) - std::exp(products[1]) + init, at::kFloat);
}

// Both streams of contrast tokens, scaled: the means of the queries over cells, which may overlap, plus the embeddings.
Tensor contrast_tokens(Tensor q, Tensor positive, Tensor negative, const std::vector<int64_t>& grid,
                       const std::vector<int64_t>& token_grid, int64_t prefix) {
  q = with_adjacent_channels(q), positive = dense(positive), negative = dense(negative);
  const int64_t heads = q.size(1), d = q.size(3), n = token_grid[0] * token_grid[1], groups = q.size(0) * heads;
  Tensor tokens = at::empty({groups, 2 * n, d}, q.options());
  const Sequence queries(q);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  const auto begin_of = [&](int axis, int64_t cell) { return cell * grid[axis] / token_grid[axis]; };
  const auto end_of = [&](int axis, int64_t cell) {
    return ((cell + 1) * grid[axis] + token_grid[axis] - 1) / token_grid[axis];
  };
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      for (int64_t cell = 0; cell < n; cell++) {
        const int64_t top = begin_of(0, cell / token_grid[1]), bottom = end_of(0, cell / token_grid[1]);
        const int64_t left = begin_of(1, cell % token_grid[1]), right = end_of(1, cell % token_grid[1]);
        const float share = 1.0f / ((bottom - top) * (right - left));
        for (int64_t i = 0; i < d; i += WIDTH) {
          Vec mean{};
          for (int64_t row = top; row < bottom; row++)
            for (int64_t column = left; column < right; column++)
              mean += load(queries.at(group, prefix + row * grid[1] + column) + i);
          mean *= share;
          const int64_t embedded = (cell * heads + group % heads) * d + i;
          float* to = start_of(tokens) + (group * 2 * n + cell) * d + i;
          store(to, (mean + load(start_of(positive) + embedded)) * scale);
          store(to + n * d, (mean + load(start_of(negative) + embedded)) * scale);
        }
      }
  });
  return tokens;
}

// All of it, without what its gradients need: contrast tokens, both stages, and what joins them.
Tensor attend(Tensor qkv, Tensor positive, Tensor negative, std::vector<Tensor> lambdas, std::vector<Tensor> gains,
              Tensor weight, Tensor bias, std::vector<int64_t> grid, std::vector<int64_t> token_grid, int64_t prefix,
              double init) {
  const int64_t batch = qkv.size(0), length = qkv.size(1), d = gains[0].size(0), heads = qkv.size(2) / 3 / d;
  const auto parts = qkv.view({batch, length, 3, heads, d}).unbind(2);
  Tensor q = parts[0].transpose(1, 2), k = parts[1].transpose(1, 2), v = parts[2].transpose(1, 2);
  const Tensor tokens = contrast_tokens(q, positive, negative, grid, token_grid, prefix).to(qkv.scalar_type());
  const std::vector<Tensor> first(lambdas.begin(), lambdas.begin() + 4), second(lambdas.begin() + 4, lambdas.end());
  Tensor gathered = std::get<0>(stage1(tokens, k, v, contrast_lambda(first, init), 1 - init));
  gathered = (gathered * gains[0]).to(qkv.scalar_type());
  gathered = stage2(tokens, q, gathered, contrast_lambda(second, init), 1 - init);
  return join(gathered, v, gains[1], weight, bias, grid[0], grid[1], prefix);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("stage1", &stage1, py::call_guard<py::gil_scoped_release>());
  m.def("stage1_backward", &stage1_backward, py::call_guard<py::gil_scoped_release>());
  m.def("stage2", &stage2, py::call_guard<py::gil_scoped_release>());
  m.def("stage2_backward", &stage2_backward, py::call_guard<py::gil_scoped_release>());
  m.def("join", &join, py::call_guard<py::gil_scoped_release>());
  m.def("join_backward", &join_backward, py::call_guard<py::gil_scoped_release>());
  m.def("attend", &attend, py::call_guard<py::gil_scoped_release>());
}
