// What Visual-Contrast Attention does between its projections, and its gradients, for a CPU (arXiv 2511.00833, section 3):
// the two stages, how their result is joined with the convolution of the values, and all of it in one.
//
// The functions at the end are those of vca.kernels.ops, by the same names, with the same shapes: what has the length of the
// sequence is a view (B, H, T, d), what has the length of the contrast tokens is (BH, 2 * n, d) or (BH, n, d). d is a
// multiple of 16. They compute in float32 whatever type they are given. Of bfloat16, `attend` and its gradients do so but for
// their products, which take numbers in bfloat16, two in a word, and sum in float32.
//
// Threads share the heads. A head's sequence is walked through in tiles of at most 64 tokens, whose scores lie transposed:
// a row for each contrast token, so that a vector holds neighbouring tokens and a softmax over contrast tokens needs no
// sums within a vector. Everything of a tile stays in the first two caches.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/alloc_cpu.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#include <torch/csrc/utils/pybind.h>  // not torch/extension.h, which takes twice as long to compile

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
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
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));  // numbers in bfloat16

template <typename To, typename From>
inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename To, typename T>
inline To load_as(const T* from) {
  To x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Vec load(const float* from) { return load_as<Vec>(from); }

inline Vec load(const BFloat16* from) {
  return bits_of<Vec>(__builtin_convertvector(load_as<Halves>(from), IntVec) << 16);
}

// To the nearest, of two to the even one; NaN stays NaN.
inline Halves rounded(Vec x) {
#if defined(__AVX512BF16__)
  return bits_of<Halves>(_mm512_cvtneps_pbh(bits_of<__m512>(x)));
#else
  const IntVec bits = bits_of<IntVec>(x), half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? half : IntVec{} + 0x7fc0, Halves);
#endif
}

template <typename T>
inline void store_halves(T* to, Halves x) {
  std::memcpy(to, &x, sizeof(x));
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

inline void store(BFloat16* to, Vec x) { store_halves(to, rounded(x)); }

// Words of two numbers in bfloat16.
inline Vec paired(Halves first, Halves second) {
  return bits_of<Vec>(__builtin_convertvector(second, IntVec) << 16 | __builtin_convertvector(first, IntVec));
}

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
template <typename T>
struct RowsOf {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
  RowsOf from(int64_t row) const { return {(*this)[row], stride}; }
  RowsOf at(int64_t column) const { return {data + column, stride}; }
  operator Entries() const { return {data, stride, 1}; }
  Entries transposed() const { return {data, 1, stride}; }
};
using Rows = RowsOf<float>;

// Numbers in a word of 32 bits, by their type. A product takes rows of words; the two numbers of a word follow one another
// along its sums.
template <typename T>
constexpr int64_t IN_WORD = sizeof(float) / sizeof(T);

template <typename T>
Rows words_of(RowsOf<T> x) {
  return {reinterpret_cast<float*>(x.data), x.stride / IN_WORD<T>};
}

// Numbers for a thread to work with, at a multiple of 64 bytes, not initialized.
class Room {
 public:
  explicit Room(int64_t count) : data_(static_cast<float*>(c10::alloc_cpu(4 * count))) {}
  Room(const Room&) = delete;
  ~Room() { c10::free_cpu(data_); }
  operator float*() const { return data_; }

 private:
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

// total += factor * row.
template <typename T>
inline void add_product(Vec& total, float factor, Vec row) {
  if constexpr (IN_WORD<T> == 1) {
    total += factor * row;
  } else {
#if defined(__AVX512BF16__)
    const auto pairs = bits_of<__m512bh>(Vec{} + factor);
    total = bits_of<Vec>(_mm512_dpbf16_ps(bits_of<__m512>(total), pairs, bits_of<__m512bh>(row)));
#else
    const int32_t pair = bits_of<int32_t>(factor), bits = 0xffff0000;
    const IntVec rows = bits_of<IntVec>(row);
    total += bits_of<float>(pair << 16) * bits_of<Vec>(rows << 16);
    total += bits_of<float>(pair & bits) * bits_of<Vec>(rows & bits);
#endif
  }
}

// c (ROWS, VECS * WIDTH) = a b, or c += a b; k is the length of the sums, in words of T.
template <typename T, int ROWS, int VECS>
inline void multiply_block(int64_t k, Entries a, Rows b, Rows c, bool add) {
  Vec total[ROWS][VECS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECS; j++) total[i][j] = add ? load(c[i] + j * WIDTH) : Vec{};
  for (int64_t l = 0; l < k; l++) {
    Vec row[VECS];
    for (int j = 0; j < VECS; j++) row[j] = load(b[l] + j * WIDTH);
    for (int i = 0; i < ROWS; i++) {
      float factor = a.data[i * a.row + l * a.column];
      for (int j = 0; j < VECS; j++) add_product<T>(total[i][j], factor, row[j]);
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECS; j++) store(c[i] + j * WIDTH, total[i][j]);
}

// c (rows, columns) = a b, or c += a b, of a (rows, k) and b (k, columns), in words of T; columns is a multiple of WIDTH.
template <typename T>
void multiply(int64_t rows, int64_t columns, int64_t k, Entries a, Rows b, Rows c, bool add = false) {
  in_parts(columns / WIDTH, BLOCK, [&](int64_t first, int64_t vectors) {
    const Rows right = b.at(first * WIDTH), to = c.at(first * WIDTH);
    with_constant<BLOCK>(vectors, [&](auto vecs) {
      in_parts(rows, 6, [&](int64_t start, int64_t size) {
        const Entries left{a.data + start * a.row, a.row, a.column};
        with_constant<6>(size, [&](auto height) {
          multiply_block<T, decltype(height)::value, decltype(vecs)::value>(k, left, right, to.from(start), add);
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

// to ((count + 1) / 2, columns): words of a row of x (count, columns) and the next; columns is a multiple of WIDTH. `to` may
// be x.
template <typename T>
void pair_rows(int64_t count, int64_t columns, RowsOf<T> x, Rows to) {
  const auto halves = [&](int64_t row, int64_t column) {
    if constexpr (IN_WORD<T> == 2)
      return load_as<Halves>(x[row] + column);
    else
      return rounded(load(x[row] + column));
  };
  for (int64_t row = 0; row < count; row += 2)
    for (int64_t column = 0; column < columns; column += WIDTH)
      store(to[row / 2] + column, paired(halves(row, column), row + 1 < count ? halves(row + 1, column) : Halves{}));
}

// Words of T for `count` numbers.
template <typename T>
int64_t words(int64_t count) {
  return (count + IN_WORD<T> - 1) / IN_WORD<T>;
}

// x (rows, columns) as a factor in words of T whose sums go along the columns: in place.
template <typename T>
Rows along_columns(int64_t rows, int64_t columns, Rows x) {
  if constexpr (IN_WORD<T> == 2)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < columns; i += WIDTH) store_halves(x[row] + i / 2, rounded(load(x[row] + i)));
  return x;
}

// The same along the rows: x itself, or in `room`, which may be x.
template <typename T, typename From>
Rows along_rows(int64_t rows, int64_t columns, RowsOf<From> x, Rows room) {
  if constexpr (IN_WORD<T> == 1) {
    return x;
  } else {
    pair_rows(rows, columns, x, room);
    return room;
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

void scale(float* x, int64_t d, const float* factors) {
  for (int64_t i = 0; i < d; i += WIDTH) store(x + i, load(x + i) * load(factors + i));
}

// to (n, d) = the first n rows of `streams` - lambda times the others.
void subtract_streams(Rows streams, float lambda, int64_t n, int64_t d, Rows to) {
  for (int64_t row = 0; row < n; row++)
    for (int64_t i = 0; i < d; i += WIDTH)
      store(to[row] + i, load(streams[row] + i) - lambda * load(streams[n + row] + i));
}

// Stage I of heads of one size, of keys and values in T; the tokens are in words of T.
template <typename T>
struct Stage1 {
  const int64_t n, d, length, chunks, chunk;  // chunk: tokens between two corrections of the running maximum
  const Room transposed, scores_room, shift, total, decay, pairs_room;
  const Rows scores;

  Stage1(int64_t n, int64_t d, int64_t length)
      : n(n),
        d(d),
        length(length),
        chunks(IN_WORD<T> == 1 ? 2 * n * length / MOST_SCORES + 1 : 1),
        chunk(whole_vectors((length + chunks - 1) / chunks)),
        transposed(d * TILE),
        scores_room(2 * n * spread(chunk)),
        shift(2 * n),
        total(2 * n),
        decay(2 * n),
        pairs_room(IN_WORD<T> == 1 ? 0 : (length + 1) / 2 * d),
        scores{scores_room, spread(chunk)} {}

  // products (2 * n, d) = A+ v and A- v.
  void multiply_streams(Rows tokens, RowsOf<T> keys, RowsOf<T> values, Rows products) const {
    for (int64_t start = 0; start < length; start += chunk) {
      const int64_t count = std::min(chunk, length - start);
      take_scores(tokens, keys, start, count);
      for (int64_t row = 0; row < 2 * n; row++) {
        const float found = exponentials(scores[row], count, shift[row]);
        total[row] = start ? total[row] * decay[row] + found : found;
        if (start) scale(products[row], d, decay[row]);
      }
      multiply_scores(2 * n, count, values.from(start), products, start > 0);
    }
    for (int64_t row = 0; row < 2 * n; row++) scale(products[row], d, 1 / total[row]);
  }

  // What the softmax took in `multiply_streams`: the maxima of the scores and the sums of their exponentials (2 * n).
  void copy_norms(float* maxima, float* sums) const {
    std::copy_n(static_cast<float*>(shift), 2 * n, maxima);
    std::copy_n(static_cast<float*>(total), 2 * n, sums);
  }

  // to (n, d) = (A+ - lambda A-) v, by one product instead of two, unless the sequence is long and in float32; `products` is
  // room for them.
  void multiply_contrast(Rows tokens, RowsOf<T> keys, RowsOf<T> values, float lambda, Rows products, Rows to) const {
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
    multiply_scores(n, length, values, to, false);
  }

 private:
  // to (rows, d) = scores (rows, count) values, or to += that.
  void multiply_scores(int64_t rows, int64_t count, RowsOf<T> values, Rows to, bool add) const {
    const Rows left = along_columns<T>(rows, count, scores);
    multiply<T>(rows, d, words<T>(count), left, along_rows<T>(count, d, values, {pairs_room, d}), to, add);
  }

  // `scores` become those of a chunk, `shift` their maxima up to its end, and `decay` what the exponentials of the chunks
  // before shrink by.
  void take_scores(Rows tokens, RowsOf<T> keys, int64_t start, int64_t count) const {
    in_tiles(count, [&](int64_t tile, int64_t inside) {
      transpose(inside, words<T>(d), words_of(keys.from(start + tile)), {transposed, TILE});
      multiply<T>(2 * n, whole_vectors(inside), words<T>(d), tokens, {transposed, TILE}, scores.at(tile));
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
    const Stage1<float> stage(n, d, length);
    for (int64_t group = begin; group < end; group++) {
      const Rows result = rows_of(out, group), product = rows_of(products, group);
      stage.multiply_streams(rows_of(tokens, group), keys.of(group), values.of(group), product);
      subtract_streams(product, lambda, n, d, result);
      for (int64_t row = 0; row < n; row++) rms_norm(result[row], d, gain);
      stage.copy_norms(start_of(norms) + group * 2 * n, start_of(norms) + (groups + group) * 2 * n);
    }
  });
  return {out.to(type), products, norms};
}

// The gradients of Stage I of heads of one size, of keys and values in T.
template <typename T>
struct Stage1Backward {
  const int64_t n, d, length;
  const Room transposed_room, maps_room, grad_map_room, difference_room, inner_room, mean, pairs_room, inner_pairs_room;

  Stage1Backward(int64_t n, int64_t d, int64_t length)
      : n(n),
        d(d),
        length(length),
        transposed_room(d * TILE),
        maps_room(2 * n * TILE),
        grad_map_room(n * TILE),
        difference_room(n * TILE),
        inner_room(n * d),
        mean(2 * n),
        pairs_room(std::max(n, d) * TILE),
        inner_pairs_room(n * d) {}

  // The gradients of tokens and keys, and that of values, which may be added; returns that of lambda. `above` (n, d) is the
  // gradient of the output; `tokens` and `token_rows` are the tokens as factors along their columns and rows; `products`,
  // `shift` and `total` are what `multiply_streams` has found.
  float run(Rows above, Rows tokens, Rows token_rows, RowsOf<T> keys, RowsOf<T> values, float lambda, float gain,
            Rows products, const float* shift, const float* total, Rows grad_tokens, Rows grad_keys, Rows grad_values,
            bool add) const {
    const Rows transposed{transposed_room, TILE}, maps{maps_room, TILE}, negative_maps = maps.from(n);
    const Rows pairs{pairs_room, TILE};
    const Rows grad_map{grad_map_room, TILE}, difference{difference_room, TILE};
    const Rows inner{inner_room, d};  // the gradient before the RMSNorm
    float grad_lambda = 0;
    subtract_streams(products, lambda, n, d, inner);
    for (int64_t row = 0; row < n; row++) {
      rms_backward(above[row], inner[row], d, gain, inner[row]);
      mean[row] = dot(inner[row], products[row], d);  // of the map's gradient, weighted by the map
      mean[n + row] = dot(inner[row], products[n + row], d);
      grad_lambda -= mean[n + row];
    }
    const Rows inner_rows = along_rows<T>(n, d, inner, {inner_pairs_room, d});
    along_columns<T>(n, d, inner);
    in_tiles(length, [&](int64_t start, int64_t count) {
      const int64_t whole = whole_vectors(count);
      transpose(count, words<T>(d), words_of(values.from(start)), transposed);
      multiply<T>(n, whole, words<T>(d), inner, transposed, grad_map);
      transpose(count, words<T>(d), words_of(keys.from(start)), transposed);
      multiply<T>(2 * n, whole, words<T>(d), tokens, transposed, maps);
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
      const Rows left = along_rows<T>(n, whole, difference, pairs);
      multiply<T>(count, d, words<T>(n), left.transposed(), inner_rows, grad_values.from(start), add);
      const Rows maps_left = along_rows<T>(2 * n, whole, maps, pairs);
      multiply<T>(count, d, words<T>(2 * n), maps_left.transposed(), token_rows, grad_keys.from(start));
      const Rows right = along_rows<T>(count, d, keys.from(start), {pairs_room, d});
      multiply<T>(2 * n, d, words<T>(count), along_columns<T>(2 * n, whole, maps), right, grad_tokens, start > 0);
    });
    return grad_lambda;
  }
};

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
    const Stage1Backward<float> stage(n, d, length);
    for (int64_t group = begin; group < end; group++) {
      const float* shift = start_of(norms) + group * 2 * n;
      start_of(grad_lam)[group] =
          stage.run(rows_of(grad, group), rows_of(tokens, group), rows_of(tokens, group), keys.of(group),
                    values.of(group), lambda, gain, rows_of(products, group), shift, shift + groups * 2 * n,
                    rows_of(grad_tokens, group), grad_keys.of(group), grad_values.of(group), false);
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

// Stage II of heads of one size, of queries in T; tokens and values are in words of T along their columns and rows. Its scores
// have a row for each contrast token, and are those of a tile of the sequence.
template <typename T>
struct Stage2 {
  const int64_t n, d, length;
  const Room transposed, maps;

  Stage2(int64_t n, int64_t d, int64_t length)
      : n(n), d(d), length(length), transposed(d * TILE), maps(2 * n * TILE) {}

  // to = gain RMSNorm((A+ - lambda A-) values).
  void run(Rows tokens, RowsOf<T> queries, Rows values, float lambda, float gain, Rows to) const {
    const Rows weights{maps, TILE};
    in_tiles(length, [&](int64_t start, int64_t count) {
      transpose(count, words<T>(d), words_of(queries.from(start)), {transposed, TILE});
      multiply<T>(2 * n, whole_vectors(count), words<T>(d), tokens, {transposed, TILE}, weights);
      contrast_scores(maps, lambda, n, count);
      const Rows left = along_rows<T>(n, whole_vectors(count), weights, weights);
      multiply<T>(count, d, words<T>(n), left.transposed(), values, to.from(start));
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
    const Stage2<float> stage(n, d, length);
    for (int64_t group = begin; group < end; group++)
      stage.run(rows_of(tokens, group), queries.of(group), rows_of(values, group), lambda, gain, outputs.of(group));
  });
  return out.to(type);
}

// The gradients of Stage II of heads of one size, of queries in T.
template <typename T>
struct Stage2Backward {
  const int64_t n, d, length;
  const Room transposed_room, maps_room, grad_map_room, difference_room, inner_room, pairs_room, value_pairs_room;

  Stage2Backward(int64_t n, int64_t d, int64_t length)
      : n(n),
        d(d),
        length(length),
        transposed_room(d * TILE),
        maps_room(2 * n * TILE),
        grad_map_room(n * TILE),
        difference_room(n * TILE),
        inner_room(TILE * d),
        pairs_room(std::max(n, d) * TILE),
        value_pairs_room(n * d) {}

  // The gradients of tokens, queries and values; returns that of lambda. `above` is the gradient of the output; `tokens` and
  // `token_rows` are the tokens as factors along their columns and rows. The values may be overwritten.
  float run(Rows above, Rows tokens, Rows token_rows, RowsOf<T> queries, Rows values, float lambda, float gain,
            Rows grad_tokens, Rows grad_queries, Rows grad_values) const {
    const Rows transposed{transposed_room, TILE}, maps{maps_room, TILE}, negative_maps = maps.from(n);
    const Rows pairs{pairs_room, TILE}, long_pairs{pairs_room, d};
    const Rows value_rows = along_rows<T>(n, d, values, {value_pairs_room, d});
    along_columns<T>(n, d, values);
    const Rows grad_map{grad_map_room, TILE}, difference{difference_room, TILE};
    const Rows inner{inner_room, d};  // what Stage II gives before its RMSNorm, then the gradient of that
    Vec grad_lambda{};
    in_tiles(length, [&](int64_t start, int64_t count) {
      const int64_t whole = whole_vectors(count);
      transpose(count, words<T>(d), words_of(queries.from(start)), transposed);
      multiply<T>(2 * n, whole, words<T>(d), tokens, transposed, maps);
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
      const Rows left = along_rows<T>(n, whole, difference, pairs);
      multiply<T>(count, d, words<T>(n), left.transposed(), value_rows, inner);
      for (int64_t i = 0; i < count; i++) rms_backward(above[start + i], inner[i], d, gain, inner[i]);
      const Rows inner_rows = along_rows<T>(count, d, inner, long_pairs);
      multiply<T>(n, d, words<T>(count), along_columns<T>(n, whole, difference), inner_rows, grad_values, start > 0);
      transpose(count, words<T>(d), along_columns<T>(count, d, inner), transposed);
      multiply<T>(n, whole, words<T>(d), values, transposed, grad_map);
      for (int64_t i = 0; i < count; i += WIDTH) {
        Vec positive_mean{}, negative_mean{};
        for (int64_t row = 0; row < n; row++) {
          positive_mean += load(maps[row] + i) * load(grad_map[row] + i);
          negative_mean += load(negative_maps[row] + i) * load(grad_map[row] + i);
        }
        grad_lambda -= negative_mean;
        for (int64_t row = 0; row < n; row++) {
          const Vec change = load(grad_map[row] + i);
          store(maps[row] + i, load(maps[row] + i) * (change - positive_mean));
          store(negative_maps[row] + i, lambda * load(negative_maps[row] + i) * (negative_mean - change));
        }
      }
      const Rows maps_left = along_rows<T>(2 * n, whole, maps, pairs);
      multiply<T>(count, d, words<T>(2 * n), maps_left.transposed(), token_rows, grad_queries.from(start));
      const Rows right = along_rows<T>(count, d, queries.from(start), long_pairs);
      multiply<T>(2 * n, d, words<T>(count), along_columns<T>(2 * n, whole, maps), right, grad_tokens, start > 0);
    });
    return sum(grad_lambda);
  }
};

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
    const Stage2Backward<float> stage(n, d, length);
    for (int64_t group = begin; group < end; group++)
      start_of(grad_lam)[group] =
          stage.run(grads.of(group), rows_of(tokens, group), rows_of(tokens, group), queries.of(group),
                    rows_of(values, group), lambda, gain, rows_of(grad_tokens, group), grad_queries.of(group),
                    rows_of(grad_values, group));
  });
  return {grad_tokens.to(type), grad_q.to(type), grad_values.to(type), grad_lam.sum()};
}

// The patches of a sequence: a grid that follows `prefix` other tokens.
struct Grid {
  int64_t rows, columns, prefix;

  // Calls visit(token, window) of every patch: a vector of the numbers of it and its neighbours in x, row by row; 0 outside.
  template <typename T, typename Visit>
  void walk(RowsOf<T> x, Visit visit) const {
    for (int64_t row = 0; row < rows; row++) {
      const bool inside[3] = {row > 0, true, row + 1 < rows};
      const RowsOf<T> line = x.from(prefix + row * columns);
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

// What a layer joins: what its stages have gathered, times a gain of each channel of a head, plus the 3x3 convolution of
// each channel of the patches' values on its own.
struct Join {
  Grid grid;
  int64_t heads, d;
  Tensor gain, weight, bias;  // (d), (C, 1, 3, 3), (C)

  Join(Grid grid, int64_t heads, const Tensor& gain, const Tensor& weight, const Tensor& bias)
      : grid(grid),
        heads(heads),
        d(gain.size(0)),
        gain(dense(gain)),
        weight(dense(weight)),
        bias(dense(bias)) {}

  // `after`, of one head.
  template <typename T>
  void run(int64_t head, Rows gathered, RowsOf<T> values, RowsOf<T> after) const {
    for (int64_t i = 0; i < d; i += WIDTH) {
      const Rows from = gathered.at(i);
      const RowsOf<T> to = after.at(i);
      const Vec scale = load(start_of(gain) + i), shift = load(start_of(bias) + head * d + i);
      Vec weights[9];
      load_weights(head * d + i, weights);
      for (int64_t token = 0; token < grid.prefix; token++) store(to[token], load(from[token]) * scale);
      grid.walk(values.at(i), [&](int64_t token, const Vec* window) {
        Vec total = load(from[token]) * scale + shift;
        for (int place = 0; place < 9; place++) total += weights[place] * window[place];
        store(to[token], total);
      });
    }
  }

  // The gradients of one head, from `above`, that of `after`: `sums` has a row of its d channels for each of the 9 weights,
  // for the bias and for the gain.
  template <typename T>
  void backward(int64_t head, Rows above, Rows gathered, RowsOf<T> values, Rows grad_gathered, Rows grad_values,
                Rows sums) const {
    for (int64_t i = 0; i < d; i += WIDTH) {
      const Rows grad = above.at(i), from = gathered.at(i), grad_from = grad_gathered.at(i);
      const Rows grad_value = grad_values.at(i), sum = sums.at(i);
      const Vec scale = load(start_of(gain) + i);
      Vec weights[9], grad_weights[9] = {}, grad_bias{}, grad_gain{};
      load_weights(head * d + i, weights);
      for (int64_t token = 0; token < grid.length(); token++) {
        grad_gain += load(grad[token]) * load(from[token]);
        store(grad_from[token], load(grad[token]) * scale);
        if (token < grid.prefix) store(grad_value[token], Vec{});
      }
      grid.walk(values.at(i), [&](int64_t token, const Vec* window) {
        const Vec own = load(grad[token]);
        grad_bias += own;
        for (int place = 0; place < 9; place++) grad_weights[place] += own * window[place];
      });
      grid.walk(grad, [&](int64_t token, const Vec* window) {
        Vec total{};
        for (int place = 0; place < 9; place++) total += weights[8 - place] * window[place];
        store(grad_value[token], total);
      });
      for (int place = 0; place < 9; place++) store(sum[place], grad_weights[place]);
      store(sum[9], grad_bias), store(sum[10], grad_gain);
    }
  }

  // The gradients of gain (d), weight (C, 1, 3, 3) and bias (C), from the sums of all heads of all images (11, B * H, d).
  std::array<Tensor, 3> gradients(const Tensor& sums) const {
    const Tensor found = sums.view({11, sums.size(1) / heads, heads * d}).sum(1);  // (11, C)
    return {found[10].view({heads, d}).sum(0), found.slice(0, 0, 9).t().contiguous().view({heads * d, 1, 3, 3}),
            found[9].clone()};
  }

 private:
  void load_weights(int64_t channel, Vec (&weights)[9]) const {
    const float* from = start_of(weight) + 9 * channel;
    for (int place = 0; place < 9; place++)
      for (int i = 0; i < WIDTH; i++) weights[place][i] = from[9 * i + place];
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
  const Join layer({rows, columns, prefix}, heads, gain, weight, bias);
  Tensor grads = dense(grad).view({gathered.size(0), gathered.size(2), heads, d}).transpose(1, 2);
  Tensor inputs = with_adjacent_channels(gathered), contents = with_adjacent_channels(v);
  Tensor grad_gathered = empty_sequence(inputs), grad_v = empty_sequence(contents);
  Tensor sums = at::empty({11, groups, d}, inputs.options());
  const Sequence above(grads), before(inputs), values(contents), grad_before(grad_gathered), grad_values(grad_v);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      layer.backward(group % heads, above.of(group), before.of(group), values.of(group), grad_before.of(group),
                     grad_values.of(group), {start_of(sums) + group * d, groups * d});
  });
  const auto found = layer.gradients(sums);
  return {grad_gathered.to(gathered.scalar_type()), grad_v.to(v.scalar_type()), found[0].to(gain.scalar_type()),
          found[1].to(weight.scalar_type()), found[2].to(bias.scalar_type())};
}

// lambda of a stage: exp(q1 . k1) - exp(q2 . k2) + init, of four vectors.
struct Lambda {
  const Tensor* vectors;
  float exponentials[2], value;

  Lambda(const Tensor* vectors, double init) : vectors(vectors) {
    for (int i = 0; i < 2; i++) {
      const Tensor q = dense(vectors[2 * i]), k = dense(vectors[2 * i + 1]);
      exponentials[i] = std::exp(dot(start_of(q), start_of(k), q.size(0)));
    }
    value = exponentials[0] - exponentials[1] + static_cast<float>(init);
  }

  // Appends the gradients of the vectors, of that of lambda.
  void backward(float grad, std::vector<Tensor>& to) const {
    for (int i = 0; i < 4; i++) {
      const float factor = i < 2 ? grad * exponentials[0] : -grad * exponentials[1];
      to.push_back(dense(vectors[i ^ 1]) * factor);
    }
  }
};

// The contrast tokens of a layer: the means of the queries over cells, which may overlap, plus the embeddings (n, C).
struct Pooling {
  Grid grid;
  int64_t rows, columns, heads, d;
  const float *positive, *negative;

  // to (2 * n, d): both streams of a head, scaled.
  template <typename T>
  void run(int64_t head, RowsOf<T> queries, Rows to) const {
    const int64_t n = rows * columns;
    for_cells([&](int64_t cell, float share, auto for_patches) {
      for (int64_t i = 0; i < d; i += WIDTH) {
        Vec mean{};
        for_patches([&](int64_t patch) { mean += load(queries[patch] + i); });
        mean *= share;
        const int64_t embedded = (cell * heads + head) * d + i;
        store(to[cell] + i, (mean + load(positive + embedded)) * scale());
        store(to[n + cell] + i, (mean + load(negative + embedded)) * scale());
      }
    });
  }

  // Adds to the gradients of a head's queries, and gives those of the embeddings (n, C): `grads` are those of both streams,
  // as each stage has found them.
  void backward(const Rows (&grads)[2], Rows grad_queries, Rows grad_positive, Rows grad_negative) const {
    const int64_t n = rows * columns;
    for_cells([&](int64_t cell, float share, auto for_patches) {
      for (int64_t i = 0; i < d; i += WIDTH) {
        const Vec first = (load(grads[0][cell] + i) + load(grads[1][cell] + i)) * scale();
        const Vec second = (load(grads[0][n + cell] + i) + load(grads[1][n + cell] + i)) * scale();
        store(grad_positive[cell] + i, first), store(grad_negative[cell] + i, second);
        const Vec each = (first + second) * share;
        for_patches([&](int64_t patch) { store(grad_queries[patch] + i, load(grad_queries[patch] + i) + each); });
      }
    });
  }

 private:
  float scale() const { return 1 / std::sqrt(static_cast<float>(d)); }

  // Calls use(cell, share, for_patches) for each cell: 1 by the number of its patches, and what calls a function for each.
  template <typename Use>
  void for_cells(Use use) const {
    for (int64_t cell = 0; cell < rows * columns; cell++) {
      const int64_t top = cell / columns * grid.rows / rows, left = cell % columns * grid.columns / columns;
      const int64_t bottom = ((cell / columns + 1) * grid.rows + rows - 1) / rows;
      const int64_t right = ((cell % columns + 1) * grid.columns + columns - 1) / columns;
      use(cell, 1.0f / ((bottom - top) * (right - left)), [&](auto visit) {
        for (int64_t row = top; row < bottom; row++)
          for (int64_t column = left; column < right; column++) visit(grid.prefix + row * grid.columns + column);
      });
    }
  }
};

// The whole layer between its projections, of 14 parameters: the embeddings of both streams, the vectors of each stage's
// lambda, the gains of their norms, and the convolution's weight and bias.
struct Layer {
  Tensor qkv, positive, negative, inner_gain;
  int64_t batch, length, heads, d, n;
  Lambda first, second;
  float gain;
  Pooling pooling;
  Join join;

  // The channels of `qkv` are adjacent.
  Layer(const Tensor& qkv, const std::vector<Tensor>& parameters, const std::vector<int64_t>& grid_size,
        const std::vector<int64_t>& token_grid, int64_t prefix, double init)
      : qkv(qkv),
        positive(dense(parameters[0])),
        negative(dense(parameters[1])),
        inner_gain(dense(parameters[10])),
        batch(qkv.size(0)),
        length(qkv.size(1)),
        heads(qkv.size(2) / 3 / inner_gain.size(0)),
        d(inner_gain.size(0)),
        n(token_grid[0] * token_grid[1]),
        first(&parameters[2], init),
        second(&parameters[6], init),
        gain(1 - init),
        pooling{{grid_size[0], grid_size[1], prefix}, token_grid[0], token_grid[1], heads, d, start_of(positive),
                start_of(negative)},
        join(pooling.grid, heads, parameters[11], parameters[12], parameters[13]) {
    TORCH_CHECK(d % 16 == 0, "a head needs a multiple of 16 channels, not ", d);
  }

  int64_t groups() const { return batch * heads; }

  // A head's part of x (B, T, parts * C).
  template <typename T = float>
  RowsOf<T> of(const Tensor& x, int64_t group, int64_t part = 0) const {
    return {x.data_ptr<T>() + group / heads * x.stride(0) + (part * heads + group % heads) * d, x.stride(1)};
  }
};

// Whether qkv can be read as words of two neighbouring channels in bfloat16, of which a head has whole vectors.
bool comes_in_pairs(const Tensor& qkv, const std::vector<Tensor>& parameters) {
  const bool even = qkv.stride(-1) == 1 && qkv.stride(0) % 2 == 0 && qkv.stride(1) % 2 == 0;
  return qkv.scalar_type() == at::kBFloat16 && even && parameters[2].size(0) % (2 * WIDTH) == 0;
}

// All of it: contrast tokens, both stages, and what joins them. A head goes through all of them before the next begins.
// With `saves`, also what the gradients need: what the stages have gathered (B, T, C), and the products and norms of
// `stage1`; they are empty otherwise.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> attend_in(const Layer& layer, bool saves) {
  const int64_t n = layer.n, d = layer.d, length = layer.length, saved = saves ? layer.groups() : 0;
  const auto options = layer.qkv.options().dtype(at::kFloat);
  const Tensor out = at::empty({layer.batch, length, layer.heads * d}, layer.qkv.options());
  const Tensor gathered = at::empty({saves ? layer.batch : 0, length, layer.heads * d}, options);
  const Tensor products = at::empty({saved, 2 * n, d}, options), norms = at::empty({2, saved, 2 * n}, options);
  const float* inner_gain = start_of(layer.inner_gain);
  at::parallel_for(0, layer.groups(), 1, [&](int64_t begin, int64_t end) {
    const Stage1<T> stage1(n, d, length);
    const Stage2<T> stage2(n, d, length);
    const Room tokens_room(2 * n * d), products_room(2 * n * d), values_room(n * d);
    const Room gathered_room(saves ? 0 : length * d);
    const Rows tokens{tokens_room, d}, inner_values{values_room, d};
    for (int64_t group = begin; group < end; group++) {
      const auto queries = layer.of<T>(layer.qkv, group, 0), keys = layer.of<T>(layer.qkv, group, 1);
      const auto values = layer.of<T>(layer.qkv, group, 2), result = layer.of<T>(out, group);
      layer.pooling.run(group % layer.heads, queries, tokens);
      along_columns<T>(2 * n, d, tokens);
      if (saves) {
        stage1.multiply_streams(tokens, keys, values, rows_of(products, group));
        subtract_streams(rows_of(products, group), layer.first.value, n, d, inner_values);
        stage1.copy_norms(start_of(norms) + group * 2 * n, start_of(norms) + (saved + group) * 2 * n);
      } else {
        stage1.multiply_contrast(tokens, keys, values, layer.first.value, {products_room, d}, inner_values);
      }
      for (int64_t cell = 0; cell < n; cell++) {
        rms_norm(inner_values[cell], d, layer.gain);
        scale(inner_values[cell], d, inner_gain);
      }
      along_rows<T>(n, d, inner_values, inner_values);
      const Rows before = saves ? layer.of(gathered, group) : Rows{gathered_room, d};
      stage2.run(tokens, queries, inner_values, layer.second.value, layer.gain, before);
      layer.join.run(group % layer.heads, before, values, result);
    }
  });
  return {out, gathered, products, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend(Tensor qkv, std::vector<Tensor> parameters,
                                                  std::vector<int64_t> grid_size, std::vector<int64_t> token_grid,
                                                  int64_t prefix, double init, bool saves) {
  const auto with = [&](const Tensor& x) { return Layer(x, parameters, grid_size, token_grid, prefix, init); };
  if (comes_in_pairs(qkv, parameters)) return attend_in<BFloat16>(with(qkv), saves);
  auto found = attend_in<float>(with(with_adjacent_channels(qkv)), saves);
  std::get<0>(found) = std::get<0>(found).to(qkv.scalar_type());
  return found;
}

template <typename T>
std::vector<Tensor> attend_backward_in(const Layer& layer, const Tensor& grad, const Tensor& gathered,
                                       const Tensor& products, const Tensor& norms) {
  const int64_t n = layer.n, d = layer.d, length = layer.length, heads = layer.heads, groups = layer.groups();
  const auto options = layer.qkv.options().dtype(at::kFloat);
  const Tensor above = with_adjacent_channels(grad);
  const Tensor grad_qkv = at::empty({layer.batch, length, 3 * heads * d}, options);
  const Tensor grad_embeds = at::empty({2, layer.batch, n, heads * d}, options);
  const Tensor grad_lambdas = at::empty({2, groups}, options), grad_inner_gain = at::empty({groups, d}, options);
  const Tensor sums = at::empty({11, groups, d}, options);
  const float* inner_gain = start_of(layer.inner_gain);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Stage1Backward<T> stage1(n, d, length);
    const Stage2Backward<T> stage2(n, d, length);
    const Room tokens_room(2 * n * d), token_pairs_room(n * d), first_room(2 * n * d), second_room(2 * n * d);
    const Room normed_room(n * d), values_room(n * d), grad_values_room(n * d), grad_gathered_room(length * d);
    const Rows tokens{tokens_room, d}, grad_tokens[2] = {{first_room, d}, {second_room, d}};
    const Rows normed{normed_room, d}, inner_values{values_room, d}, grad_inner{grad_values_room, d};
    const Rows grad_gathered{grad_gathered_room, d};
    for (int64_t group = begin; group < end; group++) {
      const auto queries = layer.of<T>(layer.qkv, group, 0), keys = layer.of<T>(layer.qkv, group, 1);
      const auto values = layer.of<T>(layer.qkv, group, 2);
      const Rows product = rows_of(products, group);
      const Rows grad_queries = layer.of(grad_qkv, group, 0), grad_values = layer.of(grad_qkv, group, 2);
      const float* shift = start_of(norms) + group * 2 * n;
      float *lambda_to = start_of(grad_lambdas) + group, *gain_to = start_of(grad_inner_gain) + group * d;
      layer.pooling.run(group % heads, queries, tokens);
      const Rows token_rows = along_rows<T>(2 * n, d, tokens, {token_pairs_room, d});
      along_columns<T>(2 * n, d, tokens);
      subtract_streams(product, layer.first.value, n, d, normed);
      for (int64_t cell = 0; cell < n; cell++) {
        rms_norm(normed[cell], d, layer.gain);
        std::copy_n(normed[cell], d, inner_values[cell]);
        scale(inner_values[cell], d, inner_gain);
      }
      layer.join.backward(group % heads, layer.of(above, group), layer.of(gathered, group), values, grad_gathered,
                          grad_values, {start_of(sums) + group * d, groups * d});
      lambda_to[groups] = stage2.run(grad_gathered, tokens, token_rows, queries, inner_values, layer.second.value,
                                     layer.gain, grad_tokens[1], grad_queries, grad_inner);
      for (int64_t i = 0; i < d; i += WIDTH) {
        Vec total{};
        for (int64_t cell = 0; cell < n; cell++) total += load(grad_inner[cell] + i) * load(normed[cell] + i);
        store(gain_to + i, total);
      }
      for (int64_t cell = 0; cell < n; cell++) scale(grad_inner[cell], d, inner_gain);
      lambda_to[0] = stage1.run(grad_inner, tokens, token_rows, keys, values, layer.first.value, layer.gain, product,
                                shift, shift + groups * 2 * n, grad_tokens[0], layer.of(grad_qkv, group, 1), grad_values,
                                true);
      layer.pooling.backward(grad_tokens, grad_queries, layer.of(grad_embeds[0], group), layer.of(grad_embeds[1], group));
    }
  });
  const Tensor embeds = grad_embeds.sum(1), slopes = grad_lambdas.sum(1);
  const auto joined = layer.join.gradients(sums);
  std::vector<Tensor> found{grad_qkv, embeds[0].clone(), embeds[1].clone()};
  layer.first.backward(start_of(slopes)[0], found), layer.second.backward(start_of(slopes)[1], found);
  found.push_back(grad_inner_gain.sum(0));
  found.insert(found.end(), joined.begin(), joined.end());
  return found;
}

// The gradients of qkv and of the parameters; `grad` is that of the output of `attend`, and the last three are what that has
// saved.
std::vector<Tensor> attend_backward(Tensor grad, Tensor qkv, std::vector<Tensor> parameters,
                                    std::vector<int64_t> grid_size, std::vector<int64_t> token_grid, int64_t prefix,
                                    double init, Tensor gathered, Tensor products, Tensor norms) {
  const auto with = [&](const Tensor& x) { return Layer(x, parameters, grid_size, token_grid, prefix, init); };
  auto found = comes_in_pairs(qkv, parameters)
                   ? attend_backward_in<BFloat16>(with(qkv), grad, gathered, products, norms)
                   : attend_backward_in<float>(with(with_adjacent_channels(qkv)), grad, gathered, products, norms);
  found[0] = found[0].to(qkv.scalar_type());
  for (size_t i = 0; i < parameters.size(); i++) found[i + 1] = found[i + 1].to(parameters[i].scalar_type());
  return found;
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
  m.def("attend_backward", &attend_backward, py::call_guard<py::gil_scoped_release>());
}
