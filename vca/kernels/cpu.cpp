// What Visual-Contrast Attention does between its projections, and its gradients, for a CPU (arXiv 2511.00833, section 3):
// the two stages, how their result is joined with the convolution of the values, and all of it in one.
//
// The functions at the end are those of vca.kernels.ops, by the same names, with the same shapes: what has the length of the
// sequence is a view (B, H, T, d), what has the length of the contrast tokens is (BH, 2 * n, d) or (BH, n, d). d is a
// multiple of 16. They compute in float32 whatever type they are given.
//
// Threads share the heads. A head's sequence is walked through in tiles of at most 64 tokens, whose scores lie transposed:
// a row for each contrast token, so that a vector holds neighbouring tokens and a softmax over contrast tokens needs no
// sums within a vector. Everything of a tile stays in the first two caches.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>  // not torch/extension.h, which takes twice as long to compile

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
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
constexpr int64_t MOST_SCORES = 1 << 17;  // of Stage I between two corrections of the running maximum
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

// A vector of any power of two of numbers.
template <int COUNT>
struct Numbers {
  typedef float type __attribute__((vector_size(4 * COUNT)));
};

// All numbers of a vector joined to one, half by half.
template <int COUNT, typename Join>
inline float joined(typename Numbers<COUNT>::type x, Join join) {
  if constexpr (COUNT == 1) {
    return x[0];
  } else {
    typename Numbers<COUNT / 2>::type low, high;
    std::memcpy(&low, &x, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
    return joined<COUNT / 2>(join(low, high), join);
  }
}

inline float sum(Vec x) {
  return joined<WIDTH>(x, [](auto a, auto b) { return a + b; });
}

inline float largest(Vec x) {
  return joined<WIDTH>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// The first `count` numbers of x, and -infinity behind them.
inline Vec first_of(Vec x, int32_t count) {
  IntVec place;
  for (int i = 0; i < WIDTH; i++) place[i] = i;
  return place < count ? x : Vec{} - std::numeric_limits<float>::infinity();
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

// A matrix whose rows, each of adjacent numbers, begin `stride` numbers apart.
struct Rows {
  float* data;
  int64_t stride;

  float* operator[](int64_t row) const { return data + row * stride; }
  Rows from(int64_t row) const { return {(*this)[row], stride}; }
  operator Entries() const { return {data, stride, 1}; }
  Entries transposed() const { return {data, 1, stride}; }
};

// Numbers for a thread to work with, at a multiple of 64 bytes, not initialized.
class Room {
 public:
  explicit Room(int64_t count) : tensor_(at::empty({count}, at::kFloat)), data_(tensor_.data_ptr<float>()) {}
  operator float*() const { return data_; }

 private:
  Tensor tensor_;
  float* data_;
};

// Calls use(std::integral_constant<int, size>) with size in 1...MOST.
template <int MOST, typename Use>
inline void with_constant(int64_t size, Use use) {
  if constexpr (MOST > 1)
    if (size < MOST) return with_constant<MOST - 1>(size, use);
  use(std::integral_constant<int, MOST>());
}

// Calls use(start, size) for as few parts of `count`, of about the same size, as have at most `most` each.
template <typename Use>
inline void in_parts(int64_t count, int64_t most, Use use) {
  int64_t start = 0;
  for (int64_t parts = (count + most - 1) / most; parts > 0; parts--) {
    const int64_t size = (count - start) / parts;
    use(start, size);
    start += size;
  }
}

// c (ROWS, VECS * WIDTH) = a b, or c += a b; k is the length of the sums.
template <int ROWS, int VECS>
inline void multiply_block(int64_t k, Entries a, Rows b, Rows c, bool add) {
  Vec total[ROWS][VECS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECS; j++) total[i][j] = add ? load(c[i] + j * WIDTH) : Vec{};
  for (int64_t l = 0; l < k; l++) {
    Vec row[VECS];
    for (int j = 0; j < VECS; j++) row[j] = load(b[l] + j * WIDTH);
    for (int i = 0; i < ROWS; i++) {
      float factor = a.data[i * a.row + l * a.column];
      for (int j = 0; j < VECS; j++) total[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECS; j++) store(c[i] + j * WIDTH, total[i][j]);
}

// c (rows, columns) = a b, or c += a b, of a (rows, k) and b (k, columns); columns is a multiple of WIDTH.
void multiply(int64_t rows, int64_t columns, int64_t k, Entries a, Rows b, Rows c, bool add = false) {
  in_parts(columns / WIDTH, BLOCK, [&](int64_t first, int64_t vectors) {
    const Rows right{b.data + first * WIDTH, b.stride}, to{c.data + first * WIDTH, c.stride};
    with_constant<BLOCK>(vectors, [&](auto vecs) {
      in_parts(rows, 6, [&](int64_t start, int64_t size) {
        const Entries left{a.data + start * a.row, a.row, a.column};
        with_constant<6>(size, [&](auto height) {
          multiply_block<decltype(height)::value, decltype(vecs)::value>(k, left, right, to.from(start), add);
        });
      });
    });
  });
}

int64_t whole_vectors(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

// Room for a row of `count` numbers: an odd number of vectors, so that a column is spread over the cache.
int64_t spread(int64_t count) { return (whole_vectors(count) / WIDTH | 1) * WIDTH; }

// Exchanges the numbers of a at places that have this bit with those of b at places that lack it.
template <int BIT, int... PLACE>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, PLACE...>) {
#if defined(__clang__)
  const Vec first = __builtin_shufflevector(a, b, (PLACE & BIT ? WIDTH + PLACE - BIT : PLACE)...);
  const Vec second = __builtin_shufflevector(a, b, (PLACE & BIT ? WIDTH + PLACE : PLACE + BIT)...);
#else
  const Vec first = __builtin_shuffle(a, b, IntVec{(PLACE & BIT ? int(WIDTH) + PLACE - BIT : PLACE)...});
  const Vec second = __builtin_shuffle(a, b, IntVec{(PLACE & BIT ? int(WIDTH) + PLACE : PLACE + BIT)...});
#endif
  a = first, b = second;
}

// Transposes a square block, of which `BIT` is half the side: quarter by quarter, then within each.
template <int BIT>
inline void transpose_block(Vec (&block)[WIDTH]) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++)
    if (!(i & BIT)) exchange<BIT>(block[i], block[i + BIT], std::make_integer_sequence<int, WIDTH>());
  if constexpr (BIT > 1) transpose_block<BIT / 2>(block);
}

// to (columns, count) = the transpose of x (count, columns); columns is a multiple of WIDTH, and the rows of `to` are filled
// with 0 up to the next whole vector.
void transpose(int64_t count, int64_t columns, Rows x, Rows to) {
  for (int64_t start = 0; start < count; start += WIDTH)
    for (int64_t column = 0; column < columns; column += WIDTH) {
      Vec block[WIDTH];
      for (int i = 0; i < WIDTH; i++) block[i] = start + i < count ? load(x[start + i] + column) : Vec{};
      transpose_block<WIDTH / 2>(block);
      for (int i = 0; i < WIDTH; i++) store(to[column + i] + start, block[i]);
    }
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

  Rows of(int64_t group) const { return {data + group / heads * batch + group % heads * head, token}; }
};

// The same of (BH, rows, d), whose channels are adjacent.
Rows rows_of(const Tensor& x, int64_t group) { return {x.data_ptr<float>() + group * x.stride(0), x.stride(1)}; }

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

float* start_of(const Tensor& x) { return x.data_ptr<float>(); }

// In the memory order (B, T, H, d), in which a layer joins its heads.
Tensor empty_sequence(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

// Calls use(start, count) for the tiles of `length` tokens, which have about the same size.
template <typename Use>
inline void in_tiles(int64_t length, Use use) {
  in_parts(whole_vectors(length) / WIDTH, TILE / WIDTH, [&](int64_t first, int64_t vectors) {
    use(first * WIDTH, std::min(vectors * WIDTH, length - first * WIDTH));
  });
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

void scale(float* x, int64_t d, float factor) {
  for (int64_t i = 0; i < d; i += WIDTH) store(x + i, load(x + i) * factor);
}

// to (n, d) = the first n rows of `streams` - lambda times the others.
void subtract_streams(Rows streams, float lambda, int64_t n, int64_t d, Rows to) {
  for (int64_t row = 0; row < n; row++)
    for (int64_t i = 0; i < d; i += WIDTH)
      store(to[row] + i, load(streams[row] + i) - lambda * load(streams[n + row] + i));
}

// Stage I of heads of one size.
struct Stage1 {
  const int64_t n, d, length, chunks, chunk;  // chunk: tokens between two corrections of the running maximum
  const Room transposed, scores_room, shift, total, decay;
  const Rows scores;

  Stage1(int64_t n, int64_t d, int64_t length)
      : n(n),
        d(d),
        length(length),
        chunks(2 * n * length / MOST_SCORES + 1),
        chunk(whole_vectors((length + chunks - 1) / chunks)),
        transposed(d * TILE),
        scores_room(2 * n * spread(chunk)),
        shift(2 * n),
        total(2 * n),
        decay(2 * n),
        scores{scores_room, spread(chunk)} {}

  // products (2 * n, d) = A+ v and A- v. `shift` and `total` are then the maxima of the scores and the sums of their
  // exponentials.
  void multiply_streams(Rows tokens, Rows keys, Rows values, Rows products) const {
    for (int64_t start = 0; start < length; start += chunk) {
      const int64_t count = std::min(chunk, length - start);
      take_scores(tokens, keys, start, count);
      for (int64_t row = 0; row < 2 * n; row++) {
        const float found = exponentials(scores[row], count, shift[row]);
        total[row] = start ? total[row] * decay[row] + found : found;
        if (start) scale(products[row], d, decay[row]);
      }
      multiply(2 * n, d, count, scores, values.from(start), products, start > 0);
    }
    for (int64_t row = 0; row < 2 * n; row++) scale(products[row], d, 1 / total[row]);
  }

  // to (n, d) = (A+ - lambda A-) v, of a short sequence by one product instead of two; `products` is room for them.
  void multiply_contrast(Rows tokens, Rows keys, Rows values, float lambda, Rows products, Rows to) const {
    if (chunks > 1) {
      multiply_streams(tokens, keys, values, products);
      return subtract_streams(products, lambda, n, d, to);
    }
    take_scores(tokens, keys, 0, length);
    for (int64_t row = 0; row < n; row++) {
      const float positive = 1 / exponentials(scores[row], length, shift[row]);
      const float negative = lambda / exponentials(scores[n + row], length, shift[n + row]);
      for (int64_t i = 0; i < length; i += WIDTH)
        store(scores[row] + i, positive * load(scores[row] + i) - negative * load(scores[n + row] + i));
    }
    multiply(n, d, length, scores, values, to);
  }

 private:
  // `scores` become those of a chunk, `shift` their maxima up to its end, and `decay` what the exponentials of the chunks
  // before shrink by.
  void take_scores(Rows tokens, Rows keys, int64_t start, int64_t count) const {
    in_tiles(count, [&](int64_t tile, int64_t inside) {
      transpose(inside, d, keys.from(start + tile), {transposed, TILE});
      multiply(2 * n, whole_vectors(inside), d, tokens, {transposed, TILE}, {scores.data + tile, scores.stride});
    });
    for (int64_t row = 0; row < 2 * n; row++) {
      float* last = scores[row] + count / WIDTH * WIDTH;
      if (count % WIDTH) store(last, first_of(load(last), count % WIDTH));
      const float highest = largest(scores[row], count);
      if (start) decay[row] = std::exp(std::min(shift[row] - highest, 0.0f));
      shift[row] = start ? std::max(shift[row], highest) : highest;
    }
  }
};

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
    const Stage1 stage(n, d, length);
    for (int64_t group = begin; group < end; group++) {
      const Rows result = rows_of(out, group), product = rows_of(products, group);
      stage.multiply_streams(rows_of(tokens, group), keys.of(group), values.of(group), product);
      subtract_streams(product, lambda, n, d, result);
      for (int64_t row = 0; row < n; row++) rms_norm(result[row], d, gain);
      std::copy_n(static_cast<float*>(stage.shift), 2 * n, start_of(norms) + group * 2 * n);
      std::copy_n(static_cast<float*>(stage.total), 2 * n, start_of(norms) + (groups + group) * 2 * n);
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
    const Room transposed_room(d * TILE), maps_room(2 * n * TILE), grad_map_room(n * TILE), difference_room(n * TILE);
    const Room inner_room(n * d), mean(2 * n);  // inner: the gradient before the RMSNorm
    const Rows transposed{transposed_room, TILE}, maps{maps_room, TILE}, negative_maps = maps.from(n);
    const Rows grad_map{grad_map_room, TILE}, difference{difference_room, TILE}, inner{inner_room, d};
    for (int64_t group = begin; group < end; group++) {
      const Rows t = rows_of(tokens, group), product = rows_of(products, group), grad_t = rows_of(grad_tokens, group);
      const float* shift = start_of(norms) + group * 2 * n;
      const float* total = shift + groups * 2 * n;
      const Rows above = rows_of(grad, group);
      float total_lam = 0;
      subtract_streams(product, lambda, n, d, inner);
      for (int64_t row = 0; row < n; row++) {
        rms_backward(above[row], inner[row], d, gain, inner[row]);
        mean[row] = dot(inner[row], product[row], d);  // of the map's gradient, weighted by the map
        mean[n + row] = dot(inner[row], product[n + row], d);
        total_lam -= mean[n + row];
      }
      start_of(grad_lam)[group] = total_lam;
      in_tiles(length, [&](int64_t start, int64_t count) {
        const Rows key = keys.of(group).from(start);
        transpose(count, d, values.of(group).from(start), transposed);
        multiply(n, whole_vectors(count), d, inner, transposed, grad_map);
        transpose(count, d, key, transposed);
        multiply(2 * n, whole_vectors(count), d, t, transposed, maps);
        for (int64_t row = 0; row < n; row++) {
          const float positive_scale = 1 / total[row], negative_scale = lambda / total[n + row];
          for (int64_t i = 0; i < count; i += WIDTH) {
            const Vec positive = positive_scale * exponential(load(maps[row] + i) - shift[row]);
            const Vec negative = negative_scale * exponential(load(negative_maps[row] + i) - shift[n + row]);
            const Vec change = load(grad_map[row] + i);
            store(difference[row] + i, positive - negative);
            store(maps[row] + i, positive * (change - mean[row]));
            store(negative_maps[row] + i, negative * (mean[n + row] - change));
          }
        }
        multiply(count, d, n, difference.transposed(), inner, grad_values.of(group).from(start));
        multiply(count, d, 2 * n, maps.transposed(), t, grad_keys.of(group).from(start));
        multiply(2 * n, d, count, maps, key, grad_t, start > 0);
      });
    }
  });
  return {grad_tokens.to(type), grad_k.to(type), grad_v.to(type), grad_lam.sum()};
}

// Replaces the scores of one stream (n, TILE), at a vector of tokens, by exp(score - maximum); returns their sum.
inline Vec exponentials_down(Rows scores, int64_t n) {
  Vec highest = load(scores[0]), total{};
  for (int64_t row = 1; row < n; row++) highest = maximum(highest, load(scores[row]));
  for (int64_t row = 0; row < n; row++) {
    const Vec weights = exponential(load(scores[row]) - highest);
    store(scores[row], weights);
    total += weights;
  }
  return total;
}

// Replaces the scores of both streams (2 * n, TILE) by A+ - lambda A- (n, TILE), for `count` tokens.
void contrast_scores(float* scores, float lambda, int64_t n, int64_t count) {
  for (int64_t start = 0; start < count; start += WIDTH) {
    const Rows positive{scores + start, TILE}, negative = positive.from(n);
    const Vec positive_scale = 1.0f / exponentials_down(positive, n);
    const Vec negative_scale = lambda / exponentials_down(negative, n);
    for (int64_t row = 0; row < n; row++)
      store(positive[row], load(positive[row]) * positive_scale - load(negative[row]) * negative_scale);
  }
}

// Stage II of heads of one size. Its scores have a row for each contrast token, and are those of a tile of the sequence.
struct Stage2 {
  const int64_t n, d, length;
  const Room transposed, maps;

  Stage2(int64_t n, int64_t d, int64_t length)
      : n(n), d(d), length(length), transposed(d * TILE), maps(2 * n * TILE) {}

  // to = gain RMSNorm((A+ - lambda A-) values).
  void run(Rows tokens, Rows queries, Rows values, float lambda, float gain, Rows to) const {
    in_tiles(length, [&](int64_t start, int64_t count) {
      transpose(count, d, queries.from(start), {transposed, TILE});
      multiply(2 * n, whole_vectors(count), d, tokens, {transposed, TILE}, {maps, TILE});
      contrast_scores(maps, lambda, n, count);
      multiply(count, d, n, Rows{maps, TILE}.transposed(), values, to.from(start));
      for (int64_t i = start; i < start + count; i++) rms_norm(to[i], d, gain);
    });
  }
};

Tensor stage2(Tensor tokens, Tensor q, Tensor values, Tensor lam, double gain) {
  const auto type = tokens.scalar_type();
  tokens = with_adjacent_channels(tokens), q = with_adjacent_channels(q), values = dense(values);
  int64_t groups, n, d, length;
  std::tie(groups, n, d, length) = sizes(tokens, q);
  Tensor out = empty_sequence(q);
  const Sequence queries(q), outputs(out);
  const float lambda = lam.item<float>();
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Stage2 stage(n, d, length);
    for (int64_t group = begin; group < end; group++)
      stage.run(rows_of(tokens, group), queries.of(group), rows_of(values, group), lambda, gain, outputs.of(group));
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
    const Room transposed_room(d * TILE), maps_room(2 * n * TILE), grad_map_room(n * TILE), difference_room(n * TILE);
    const Room inner_room(TILE * d);  // what Stage II gives before its RMSNorm, then the gradient of that
    const Rows transposed{transposed_room, TILE}, maps{maps_room, TILE}, negative_maps = maps.from(n);
    const Rows grad_map{grad_map_room, TILE}, difference{difference_room, TILE}, inner{inner_room, d};
    for (int64_t group = begin; group < end; group++) {
      const Rows t = rows_of(tokens, group), value = rows_of(values, group), grad_t = rows_of(grad_tokens, group);
      Vec total_lam{};
      in_tiles(length, [&](int64_t start, int64_t count) {
        const Rows query = queries.of(group).from(start), above = grads.of(group).from(start);
        transpose(count, d, query, transposed);
        multiply(2 * n, whole_vectors(count), d, t, transposed, maps);
        for (int64_t i = 0; i < count; i += WIDTH) {
          const Rows positive{maps.data + i, TILE}, negative = positive.from(n);
          const Vec positive_scale = 1.0f / exponentials_down(positive, n);
          const Vec negative_scale = 1.0f / exponentials_down(negative, n);
          for (int64_t row = 0; row < n; row++) {
            const Vec pulled = load(positive[row]) * positive_scale, pushed = load(negative[row]) * negative_scale;
            store(positive[row], pulled), store(negative[row], pushed);
            store(difference[row] + i, pulled - lambda * pushed);
          }
        }
        multiply(count, d, n, difference.transposed(), value, inner);
        for (int64_t i = 0; i < count; i++) rms_backward(above[i], inner[i], d, gain, inner[i]);
        multiply(n, d, count, difference, inner, rows_of(grad_values, group), start > 0);
        transpose(count, d, inner, transposed);
        multiply(n, whole_vectors(count), d, value, transposed, grad_map);
        for (int64_t i = 0; i < count; i += WIDTH) {
          Vec positive_mean{}, negative_mean{};
          for (int64_t row = 0; row < n; row++) {
            positive_mean += load(maps[row] + i) * load(grad_map[row] + i);
            negative_mean += load(negative_maps[row] + i) * load(grad_map[row] + i);
          }
          total_lam -= negative_mean;
          for (int64_t row = 0; row < n; row++) {
            const Vec change = load(grad_map[row] + i);
            store(maps[row] + i, load(maps[row] + i) * (change - positive_mean));
            store(negative_maps[row] + i, lambda * load(negative_maps[row] + i) * (negative_mean - change));
          }
        }
        multiply(count, d, 2 * n, maps.transposed(), t, grad_queries.of(group).from(start));
        multiply(2 * n, d, count, maps, query, grad_t, start > 0);
      });
      start_of(grad_lam)[group] = sum(total_lam);
    }
  });
  return {grad_tokens.to(type), grad_q.to(type), grad_values.to(type), grad_lam.sum()};
}

// The patches of a sequence: a grid that follows `prefix` other tokens.
struct Grid {
  int64_t rows, columns, prefix;

  // Calls visit(token, window) of every patch: a vector of the numbers of it and its neighbours in x, row by row; 0 outside.
  template <typename Visit>
  void walk(Rows x, Visit visit) const {
    for (int64_t row = 0; row < rows; row++) {
      const bool inside[3] = {row > 0, true, row + 1 < rows};
      const Rows line = x.from(prefix + row * columns);
      Vec window[9] = {};
      const auto shift_in = [&](int64_t column) {
        for (int i = 0; i < 3; i++) {
          window[3 * i] = window[3 * i + 1], window[3 * i + 1] = window[3 * i + 2];
          window[3 * i + 2] = column < columns && inside[i] ? load(line[(i - 1) * columns + column]) : Vec{};
        }
      };
      shift_in(0);
      for (int64_t column = 0; column < columns; column++) {
        shift_in(column + 1);
        visit(prefix + row * columns + column, window);
      }
    }
  }

  int64_t length() const { return prefix + rows * columns; }
};

// What a layer joins: what its stages have gathered, times a gain of each channel of a head, plus the 3x3 convolution of each
// channel of the patches' values on its own.
struct Join {
  Grid grid;
  int64_t heads, d;
  Tensor gain, weight, bias;  // (d), (9, C), (C)

  Join(Grid grid, int64_t heads, Tensor gain_, Tensor weight_, Tensor bias_)
      : grid(grid),
        heads(heads),
        d(gain_.size(0)),
        gain(dense(gain_)),
        weight(dense(weight_.flatten(1).t())),
        bias(dense(bias_)) {}

  // `after`, which may be `gathered`, of one head.
  void run(int64_t head, Rows gathered, Rows values, Rows after) const {
    for (int64_t i = 0; i < d; i += WIDTH) {
      const Rows from{gathered.data + i, gathered.stride}, to{after.data + i, after.stride};
      const Vec scale = load(start_of(gain) + i), shift = load(start_of(bias) + head * d + i);
      Vec weights[9];
      for (int place = 0; place < 9; place++) weights[place] = load(start_of(weight) + (place * heads + head) * d + i);
      for (int64_t token = 0; token < grid.prefix; token++) store(to[token], load(from[token]) * scale);
      grid.walk({values.data + i, values.stride}, [&](int64_t token, const Vec* window) {
        Vec total = load(from[token]) * scale + shift;
        for (int place = 0; place < 9; place++) total += weights[place] * window[place];
        store(to[token], total);
      });
    }
  }
};

// What Join makes of all heads, in the order (B, T, C), with weights (C, 1, 3, 3).
Tensor join(Tensor gathered, Tensor v, Tensor gain, Tensor weight, Tensor bias, int64_t rows, int64_t columns,
            int64_t prefix) {
  const auto type = gathered.scalar_type();
  gathered = with_adjacent_channels(gathered), v = with_adjacent_channels(v);
  const int64_t heads = gathered.size(1);
  Tensor out = empty_sequence(gathered);
  const Join layer({rows, columns, prefix}, heads, gain, weight, bias);
  const Sequence before(gathered), values(v), after(out);
  at::parallel_for(0, gathered.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      layer.run(group % heads, before.of(group), values.of(group), after.of(group));
  });
  return out.transpose(1, 2).flatten(2).to(type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> join_backward(Tensor grad, Tensor gathered, Tensor v, Tensor gain,
                                                                 Tensor weight, Tensor bias, int64_t rows,
                                                                 int64_t columns, int64_t prefix) {
  const int64_t heads = gathered.size(1), d = gathered.size(3), groups = gathered.size(0) * heads;
  const Grid grid{rows, columns, prefix};
  Tensor grads = dense(grad).view({gathered.size(0), gathered.size(2), heads, d}).transpose(1, 2);
  Tensor inputs = with_adjacent_channels(gathered), contents = with_adjacent_channels(v);
  Tensor factors = dense(gain), filters = dense(weight.flatten(1).t());
  Tensor grad_gathered = empty_sequence(inputs), grad_v = empty_sequence(contents);
  Tensor sums = at::empty({11, groups, d}, inputs.options());  // the gradients of the 9 weights, the bias and the gain
  const Sequence all_grads(grads), before(inputs), values(contents), grad_before(grad_gathered), grad_values(grad_v);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      for (int64_t i = 0; i < d; i += WIDTH) {
        const auto channels = [&](const Sequence& x) { return Rows{x.of(group).data + i, x.token}; };
        const Rows above = channels(all_grads), from = channels(before), to = channels(grad_before);
        const Rows grad_value = channels(grad_values);
        const Vec scale = load(start_of(factors) + i);
        Vec weights[9], grad_weights[9] = {}, grad_bias{}, grad_gain{};
        for (int place = 0; place < 9; place++)
          weights[place] = load(start_of(filters) + (place * heads + group % heads) * d + i);
        for (int64_t token = 0; token < grid.length(); token++) {
          store(to[token], load(above[token]) * scale);
          grad_gain += load(above[token]) * load(from[token]);
          if (token < prefix) store(grad_value[token], Vec{});
        }
        grid.walk(channels(values), [&](int64_t token, const Vec* window) {
          const Vec own = load(above[token]);
          grad_bias += own;
          for (int place = 0; place < 9; place++) grad_weights[place] += own * window[place];
        });
        grid.walk(above, [&](int64_t token, const Vec* window) {
          Vec total{};
          for (int place = 0; place < 9; place++) total += weights[8 - place] * window[place];
          store(grad_value[token], total);
        });
        float* found = start_of(sums) + group * d + i;
        for (int place = 0; place < 9; place++) store(found + place * groups * d, grad_weights[place]);
        store(found + 9 * groups * d, grad_bias), store(found + 10 * groups * d, grad_gain);
      }
  });
  sums = sums.view({11, gathered.size(0), heads * d}).sum(1);  // (11, C)
  return {grad_gathered.to(gathered.scalar_type()), grad_v.to(v.scalar_type()),
          sums[10].view({heads, d}).sum(0).to(gain.scalar_type()),
          sums.slice(0, 0, 9).t().contiguous().view(weight.sizes()).to(weight.scalar_type()),
          sums[9].clone().to(bias.scalar_type())};
}

// exp(q1 . k1) - exp(q2 . k2) + init, of the vectors q1, k1, q2, k2 that begin at `from`.
float contrast_lambda(const std::vector<Tensor>& vectors, int64_t from, double init) {
  float products[2];
  for (int i = 0; i < 2; i++) {
    Tensor q = dense(vectors[from + 2 * i]), k = dense(vectors[from + 2 * i + 1]);
    products[i] = dot(start_of(q), start_of(k), q.size(0));
  }
  return std::exp(products[0]) - std::exp(products[1]) + static_cast<float>(init);
}

// The contrast tokens of a layer: the means of the queries over cells, which may overlap, plus the embeddings (n, C).
struct Pooling {
  Grid grid;
  int64_t rows, columns, heads, d;
  const float *positive, *negative;

  // to (2 * n, d): both streams of a head, scaled.
  void run(int64_t head, Rows queries, Rows to) const {
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    for (int64_t cell = 0; cell < rows * columns; cell++) {
      const int64_t top = cell / columns * grid.rows / rows, left = cell % columns * grid.columns / columns;
      const int64_t bottom = ((cell / columns + 1) * grid.rows + rows - 1) / rows;
      const int64_t right = ((cell % columns + 1) * grid.columns + columns - 1) / columns;
      const float share = 1.0f / ((bottom - top) * (right - left));
      for (int64_t i = 0; i < d; i += WIDTH) {
        Vec mean{};
        for (int64_t row = top; row < bottom; row++)
          for (int64_t column = left; column < right; column++)
            mean += load(queries[grid.prefix + row * grid.columns + column] + i);
        mean *= share;
        const int64_t embedded = (cell * heads + head) * d + i;
        store(to[cell] + i, (mean + load(positive + embedded)) * scale);
        store(to[rows * columns + cell] + i, (mean + load(negative + embedded)) * scale);
      }
    }
  }
};

// All of it, without what its gradients need: contrast tokens, both stages, and what joins them. A head goes through all of
// them before the next begins.
Tensor attend(Tensor qkv, Tensor positive, Tensor negative, std::vector<Tensor> lambdas, std::vector<Tensor> gains,
              Tensor weight, Tensor bias, std::vector<int64_t> grid_size, std::vector<int64_t> token_grid,
              int64_t prefix, double init) {
  const auto type = qkv.scalar_type();
  qkv = with_adjacent_channels(qkv);
  const int64_t batch = qkv.size(0), length = qkv.size(1), d = gains[0].size(0), heads = qkv.size(2) / 3 / d;
  const int64_t n = token_grid[0] * token_grid[1];
  TORCH_CHECK(d % 16 == 0, "a head needs a multiple of 16 channels, not ", d);
  const Grid grid{grid_size[0], grid_size[1], prefix};
  positive = dense(positive), negative = dense(negative);
  const Pooling pooling{grid, token_grid[0], token_grid[1], heads, d, start_of(positive), start_of(negative)};
  const Join join(grid, heads, gains[1], weight, bias);
  const float first = contrast_lambda(lambdas, 0, init), second = contrast_lambda(lambdas, 4, init), gain = 1 - init;
  const Tensor inner_gain = dense(gains[0]), out = at::empty({batch, length, heads * d}, qkv.options());
  const float* gains_of_inner = start_of(inner_gain);
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Stage1 stage1(n, d, length);
    const Stage2 stage2(n, d, length);
    const Room tokens_room(2 * n * d), products_room(2 * n * d), inner_room(n * d);
    const Rows tokens{tokens_room, d}, products{products_room, d}, inner{inner_room, d};
    for (int64_t group = begin; group < end; group++) {
      const int64_t image = group / heads, head = group % heads;
      const Rows queries{start_of(qkv) + image * qkv.stride(0) + head * d, qkv.stride(1)};
      const Rows keys{queries.data + heads * d, queries.stride}, values{keys.data + heads * d, queries.stride};
      const Rows result{start_of(out) + image * out.stride(0) + head * d, out.stride(1)};
      pooling.run(head, queries, tokens);
      stage1.multiply_contrast(tokens, keys, values, first, products, inner);
      for (int64_t cell = 0; cell < n; cell++) {
        rms_norm(inner[cell], d, gain);
        for (int64_t i = 0; i < d; i += WIDTH) store(inner[cell] + i, load(inner[cell] + i) * load(gains_of_inner + i));
      }
      stage2.run(tokens, queries, inner, second, gain, result);
      join.run(head, result, values, result);
    }
  });
  return out.to(type);
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
