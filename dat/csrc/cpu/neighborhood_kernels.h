// The kernels of neighborhood_attn, compiled once for each instruction set: see vector.h. No standard library here.
//
// Rows of pixels are turned so that a register holds a channel of neighbouring pixels: what query x and key x + shift have
// to do with each other is then one multiplication for as many x. Windows that a border moves have other shifts than the
// rest: registers that meet them go through all their shifts, and mask.
#pragma once

#include "neighborhood.h"
#include "neighborhood_blocks.h"

namespace dat {
namespace DAT_ISA {
namespace neighborhood {

// Scratch memory and the steps of one thread.
template <typename T, typename Real>
class Neighborhood {
 public:
  static constexpr int N = kLanes<Real>;
  using V = Vec<Real, N>;
  using Int = IntOf<Real>;
  using I = Vec<Int, N>;

  Neighborhood(const NeighborhoodArgs& args, int64_t most_rows, bool with_backward, char* scratch)
      : args(args),
        K(args.kernel),
        radius(args.kernel / 2),
        side(2 * args.kernel - 1),
        channels(round_up(args.C, kChannels)),
        pad(round_up(K - 1, N)),
        // An odd number of registers: rows of a power of two would meet in few sets of the cache.
        stride((round_up(args.W / args.dilation + 1, N) + 2 * pad) / N / 2 * 2 * N + N),
        row_size(channels * stride),
        scratch_(scratch) {
    const int64_t window_rows = most_rows + K - 1;
    query_ = take(kRows * row_size), out_ = take(kRows * row_size);
    key_ = take(window_rows * row_size), value_ = take(window_rows * row_size);
    // A register of pixels at a time; in backward, whole rows, with zeros where there are no neighbours.
    tap_step = with_backward ? stride : N;
    window_step = side * tap_step;
    attention_ = take(kRows * K * window_step + 2 * pad);
    sources_ = reinterpret_cast<Source<Real>*>(take((K + kRows) * int64_t(sizeof(Source<Real>) / sizeof(Real))));
    inside_ = reinterpret_cast<Int*>(take(side * N));
    if (with_backward) {
      grad_ = take(kRows * row_size);
      grad_attention_ = take(kRows * K * window_step + 2 * pad);
      grad_bias_ = take(side * side * N);
      // Sums are taken kRows rows at a time, the last of which may lie below the window.
      grad_key_ = take((window_rows + kRows) * row_size), grad_value_ = take((window_rows + kRows) * row_size);
    }
  }

  int64_t bytes() const { return used_ * int64_t(sizeof(Real)); }

  void forward(const NeighborhoodPart& part, T* out) {
    begin(part);
    for (int64_t i = part.row_begin; i < part.row_end; i += kRows) {
      const int64_t count = at_most(kRows, part.row_end - i);
      load_rows(args.query, i, i + count, Real(args.scale), query_);
      load_window(i + count);
      for (int64_t x = 0; x < part.columns; x += N) {
        const Block block = query_block(x, 0);
        prefetch(args.query, i + count, i + count + kRows, x);
        multiply_rows(i, count, block, query_, key_, attention_);
        prefetch(args.key, window_end_, window_end_ + kRows, x);
        for (int64_t m = 0; m < count; m++) softmax(i + m, block, attention_ + m * K * window_step);
        prefetch(args.value, window_end_, window_end_ + kRows, x);
        add_keys(i, count, block, attention_, value_, out_);
      }
      store_rows(out_, i, count, 1, out);
    }
  }

  void backward(const NeighborhoodPart& part, const NeighborhoodGrads& grads) {
    begin(part);
    const int64_t window_rows = window(part.row_end - 1) + K - window_begin_;
    __builtin_memset(grad_key_, 0, window_rows * row_size * sizeof(Real));
    __builtin_memset(grad_value_, 0, window_rows * row_size * sizeof(Real));
    __builtin_memset(grad_bias_, 0, side * side * N * sizeof(Real));
    for (int64_t i = part.row_begin; i < part.row_end; i += kRows) {
      const int64_t count = at_most(kRows, part.row_end - i);
      load_rows(args.query, i, i + count, Real(args.scale), query_);
      load_rows(grads.out, i, i + count, 1, grad_);
      load_window(i + count);
      for (int64_t x = 0; x < part.columns; x += N) {
        prefetch(args.query, i + count, i + count + kRows, x);
        prefetch(grads.out, i + count, i + count + kRows, x);
        differentiate(i, count, query_block(x, pad + x));
        prefetch(args.key, window_end_, window_end_ + kRows, x);
        prefetch(args.value, window_end_, window_end_ + kRows, x);
      }
      store_rows(out_, i, count, Real(args.scale), static_cast<T*>(grads.grad_query));
      for (int64_t m = 0; m < count; m++) add_bias(i + m, grad_attention_ + m * K * window_step);
      add_queries(i, count);
    }
    const int64_t C = args.C;
    for (int64_t r = 0; r < window_rows; r++) {
      const int64_t place = r * part.columns * C;
      store_pixels(
          grad_key_ + r * row_size + pad, stride, part.columns, C, Real(1), static_cast<Real*>(grads.grad_key) + place, C);
      store_pixels(
          grad_value_ + r * row_size + pad, stride, part.columns, C, Real(1), static_cast<Real*>(grads.grad_value) + place,
          C);
    }
    for (int64_t k = 0; k < side * side; k++)
      static_cast<Real*>(grads.grad_bias)[k] = Sum<Real, N>::of(load(grad_bias_ + k * N));
  }

 private:
  // A register of queries (or of keys): its first column, the index of that column in scores, and the range of shifts from
  // queries to their keys.
  struct Block {
    int64_t x, place, first, taps;
    // Whether a border moves some of the windows.
    bool masked;
    // For queries, the distance from the start of their windows to them, and whether they are in the map.
    I reach, exists;
  };

  const NeighborhoodArgs& args;
  const int64_t K, radius, side, channels, pad, stride, row_size;
  int64_t tap_step, window_step;
  char* scratch_;
  int64_t used_ = 0;
  const NeighborhoodPart* part_;
  // Rows of keys and values that are there.
  int64_t window_begin_, window_end_;
  // Whether all pixels of the part that were loaded so far are.
  bool finite_;
  Real *query_, *out_, *key_, *value_, *attention_;
  Source<Real>* sources_;
  // Of every shift between a register of pixels and their neighbours the lanes that are neighbours: where not all is finite.
  Int* inside_;
  Real *grad_, *grad_attention_, *grad_bias_, *grad_key_, *grad_value_;

  Real* take(int64_t count) {
    Real* taken = reinterpret_cast<Real*>(scratch_) + used_;
    used_ += round_up(count, N);
    return taken;
  }

  int64_t window(int64_t row) const { return window_start(row, part_->rows, K); }

  void begin(const NeighborhoodPart& part) {
    part_ = &part, finite_ = true;
    window_begin_ = window_end_ = window(part.row_begin);
  }

  // Loads the keys and values, as far as they are not there, of the queries above row `end`.
  void load_window(int64_t end) {
    const int64_t begin = window_end_, place = (begin - window_begin_) * row_size;
    window_end_ = window(end - 1) + K;
    load_rows(args.key, begin, window_end_, 1, key_ + place);
    load_rows(args.value, begin, window_end_, 1, value_ + place);
  }

  // The pixel that a row of the part's map begins with, counted in the whole map.
  int64_t first_pixel(int64_t row) const { return (part_->first_row + row * args.dilation) * args.W + part_->first_column; }

  const T* head_of(const HeadPixels& pixels) const {
    return static_cast<const T*>(pixels.data) + part_->image * pixels.image + part_->head * pixels.head;
  }

  // Asks for a register of pixels of rows [begin, end), as far as the map has them, while there is other work to do: heads
  // lie far apart in memory, where the processor expects nothing.
  void prefetch(const HeadPixels& from, int64_t begin, int64_t end, int64_t x) {
    const T* head = head_of(from);
    const int64_t pixels = at_most(N, part_->columns - x), step = from.pixel * args.dilation;
    for (int64_t r = begin; r < at_most(end, part_->rows); r++) {
      const T* pixel = head + first_pixel(r) * from.pixel + x * step;
      for (int64_t i = 0; i < pixels; i++, pixel += step)
        for (int64_t c = 0; c < args.C; c += kLineBytes / int64_t(sizeof(T))) __builtin_prefetch(pixel + c);
    }
  }

  void load_rows(const HeadPixels& from, int64_t begin, int64_t end, Real factor, Real* to) {
    const T* head = head_of(from);
    for (int64_t r = begin; r < end; r++, to += row_size) {
      const T* pixels = head + first_pixel(r) * from.pixel;
      finite_ &= load_pixels(pixels, from.pixel * args.dilation, part_->columns, args.C, factor, to + pad, stride, channels);
    }
  }

  void store_rows(const Real* from, int64_t first, int64_t count, Real factor, T* to) {
    const int64_t pixel = args.heads * args.C;
    T* head = to + part_->image * args.H * args.W * pixel + part_->head * args.C;
    for (int64_t m = 0; m < count; m++, from += row_size) {
      T* pixels = head + first_pixel(first + m) * pixel;
      store_pixels(from + pad, stride, part_->columns, args.C, factor, pixels, pixel * args.dilation);
    }
  }

  Block query_block(int64_t x, int64_t place) const {
    const int64_t columns = part_->columns, last = at_most(x + N, columns) - 1;
    Block block = {};
    block.x = x, block.place = place;
    block.first = window_start(last, columns, K) - last;
    block.taps = window_start(x, columns, K) + K - x - block.first;
    block.masked = x < radius || x + N > columns - radius;
    // Lanes beyond the map have nothing to say, but as lanes without neighbours they would divide by zero.
    for (int i = 0; i < N; i++) block.reach[i] = x + i < columns ? x + i - window_start(x + i, columns, K) : 0;
    for (int i = 0; i < N; i++) block.exists[i] = x + i < columns ? -1 : 0;
    return block;
  }

  Block key_block(int64_t x) const {
    const int64_t columns = part_->columns, last = at_most(x + N, columns) - 1;
    Block block = {};
    block.x = x;
    block.first = last >= columns - K ? at_least(x, columns - K) - (columns - 1) : -radius;
    block.taps = (x < K ? at_most(last, K - 1) : radius) + 1 - block.first;
    return block;
  }

  // Finds the rows among [first, first + count) of queries that have key row r in their windows.
  void rows_with(int64_t r, int64_t first, int64_t count, int64_t& begin, int64_t& end) const {
    begin = 0, end = count;
    while (window(first + begin) + K <= r) begin++;
    while (window(first + end - 1) > r) end--;
  }

  // Products of queries with their keys, or of other tensors with the same layout.
  void multiply_rows(int64_t first, int64_t count, const Block& block, const Real* pixels, const Real* others, Real* to) {
    for (int64_t r = window(first); r < window(first + count - 1) + K; r++) {
      int64_t begin, end;
      rows_with(r, first, count, begin, end);
      const Real* row = others + (r - window_begin_) * row_size + pad + block.x + block.first;
      const int64_t chunks = (block.taps + kTaps - 1) / kTaps;
      for (int64_t k = 0; k < chunks; k++) {
        const int64_t tap = block.taps * k / chunks, taps = block.taps * (k + 1) / chunks - tap;
        Real* places[kRows];
        for (int64_t m = begin; m < end; m++) places[m - begin] = to + score(first, m, r, block.first + tap) + block.place;
        choose_multiply<Real>(end - begin, taps)(
            pixels + begin * row_size + pad + block.x, row_size, row + tap, stride, channels, places, tap_step);
      }
    }
  }

  // Returns the index of the scores of query row first + m with key row r, `shift` columns to the right.
  int64_t score(int64_t first, int64_t m, int64_t r, int64_t shift) const {
    return (m * K + r - window(first + m)) * window_step + (shift + K - 1) * tap_step;
  }

  // Adds the bias to the scores of a row of queries and turns them into attention.
  void softmax(int64_t row, const Block& block, Real* scores) {
    const Real* bias = static_cast<const Real*>(args.bias);
    if (bias) bias += (part_->head * side + window(row) - row + K - 1) * side + block.first + K - 1;
    V top = V{} - Real(__builtin_inf());
    scores += (block.first + K - 1) * tap_step + block.place;
    for (int64_t t = 0; t < block.taps; t++) {
      const I inside = neighbours(block, t);
      for (int64_t a = 0; a < K; a++) {
        Real* place = scores + a * window_step + t * tap_step;
        V s = load(place);
        if (bias) s += bias[a * side + t];
        if (block.masked) s = inside ? s : V{} - Real(__builtin_inf());
        store(place, s);
        top = s > top ? s : top;
      }
    }
    V sum = {};
    for_scores(block, scores, [&](V s, int64_t) {
      const V e = Exp<Real, N>::of(s - top);
      sum += e;
      return e;
    });
    const V factor = 1 / sum;
    for_scores(block, scores, [&](V s, int64_t) { return s * factor; });
  }

  // The queries of a block whose windows hold the pixel `block.first + t` further.
  DAT_HOST_DEVICE I neighbours(const Block& block, int64_t t) const {
    const I place = block.reach + Int(block.first + t);
    return (place >= 0) & (place < Int(K));
  }

  // Pairs that are no neighbours get exactly zero: a NaN of either is not to reach the other.
  DAT_HOST_DEVICE void keep_neighbours(const Block& block, Real* scores) const {
    for (int64_t t = 0; t < block.taps; t++) {
      const I inside = neighbours(block, t) & block.exists;
      for (int64_t a = 0; a < K; a++) {
        Real* place = scores + a * window_step + t * tap_step;
        store(place, inside ? load(place) : V{});
      }
    }
  }

  // Replaces the scores of a block, which begin at `scores`, by `function` of the scores and their indices.
  template <typename F>
  DAT_HOST_DEVICE void for_scores(const Block& block, Real* scores, F function) {
    for (int64_t a = 0; a < K; a++) {
      for (int64_t t = 0; t < block.taps; t++) {
        const int64_t place = a * window_step + t * tap_step;
        store(scores + place, function(load(scores + place), place));
      }
    }
  }

  // Sums of the rows of `pixels` that are in the windows of a block of queries, times their factors.
  void add_keys(int64_t first, int64_t count, const Block& block, const Real* factors, const Real* pixels, Real* to) {
    int64_t sources = 0;
    for (int64_t r = window(first); r < window(first + count - 1) + K; r++) {
      Source<Real>& source = sources_[sources++];
      rows_with(r, first, count, source.begin, source.end);
      source.pixels = pixels + (r - window_begin_) * row_size + pad + block.x + block.first;
      for (int64_t m = source.begin; m < source.end; m++)
        source.factors[m] = factors + score(first, m, r, block.first) + block.place;
    }
    if (finite_) {
      add_sources<false>(
          sources_, sources, block.taps, tap_step, 1, stride, channels, true, to + pad + block.x, row_size, inside_);
    } else {
      for (int64_t t = 0; t < block.taps; t++) Store<Int, N, Int>::to(inside_ + t * N, neighbours(block, t));
      add_sources<true>(
          sources_, sources, block.taps, tap_step, 1, stride, channels, true, to + pad + block.x, row_size, inside_);
    }
  }

  // Attention, its gradient by the scores, and the gradient by the queries of a block.
  void differentiate(int64_t first, int64_t count, const Block& block) {
    multiply_rows(first, count, block, query_, key_, attention_);
    multiply_rows(first, count, block, grad_, value_, grad_attention_);
    for (int64_t m = 0; m < count; m++) {
      const int64_t place = m * K * window_step;
      softmax(first + m, block, attention_ + place);
      const int64_t start = place + (block.first + K - 1) * tap_step + block.place;
      V mean = average(block, start);
      // Where all is finite, pairs that are no neighbours are zero already.
      const bool spoiled = block.masked && !(finite_ && Sum<Real, N>::of(mean * 0) == 0);
      if (spoiled) {
        keep_neighbours(block, attention_ + start), keep_neighbours(block, grad_attention_ + start);
        mean = average(block, start);
      }
      const Real* attention = attention_ + start;
      for_scores(block, grad_attention_ + start, [&](V by, int64_t k) { return (by - mean) * load(attention + k); });
      if (spoiled) keep_neighbours(block, grad_attention_ + start);
    }
    add_keys(first, count, block, grad_attention_, key_, out_);
  }

  // The mean of the gradients by the attention of a block, from `start`, weighted with it.
  V average(const Block& block, int64_t start) {
    V mean = {};
    for (int64_t a = 0; a < K; a++) {
      for (int64_t t = 0; t < block.taps; t++) {
        const int64_t place = start + a * window_step + t * tap_step;
        mean += load(grad_attention_ + place) * load(attention_ + place);
      }
    }
    return mean;
  }

  void add_bias(int64_t row, const Real* grad_scores) {
    const int64_t first = window(row) - row + K - 1;
    for (int64_t a = 0; a < K; a++) {
      for (int64_t t = 0; t < side; t++) {
        const Real* place = grad_scores + a * window_step + t * tap_step + pad;
        V sum = load(grad_bias_ + ((first + a) * side + t) * N);
        for (int64_t x = 0; x < part_->columns; x += N) sum += load(place + x);
        store(grad_bias_ + ((first + a) * side + t) * N, sum);
      }
    }
  }

  // Adds the contributions of rows of queries to the gradients of the keys and values in their windows.
  void add_queries(int64_t first, int64_t count) {
    const int64_t begin = window(first), end = window(first + count - 1) + K;
    for (int64_t r = begin; r < end; r += kRows) {
      for (int64_t x = 0; x < part_->columns; x += N) {
        const Block block = key_block(x);
        const int64_t place = (r - window_begin_) * row_size + pad + x;
        add_rows(first, count, r, at_most(r + kRows, end), block, attention_, grad_, grad_value_ + place);
        add_rows(first, count, r, at_most(r + kRows, end), block, grad_attention_, query_, grad_key_ + place);
      }
    }
  }

  void add_rows(
      int64_t first, int64_t count, int64_t r, int64_t end, const Block& block, const Real* factors, const Real* pixels,
      Real* to) {
    int64_t sources = 0;
    const int64_t column = pad + block.x - block.first;
    for (int64_t m = 0; m < count; m++) {
      Source<Real>& source = sources_[sources];
      source.begin = at_least(window(first + m) - r, 0);
      source.end = at_most(window(first + m) + K, end) - r;
      if (source.begin >= source.end) continue;
      sources++;
      source.pixels = pixels + m * row_size + column;
      for (int64_t k = source.begin; k < source.end; k++)
        source.factors[k] = factors + score(first, m, r + k, block.first) + column;
    }
    if (finite_) {
      add_sources<false>(sources_, sources, block.taps, tap_step - 1, -1, stride, channels, false, to, row_size, inside_);
    } else {
      mark_queries(block);
      add_sources<true>(sources_, sources, block.taps, tap_step - 1, -1, stride, channels, false, to, row_size, inside_);
    }
  }

  // Marks in `inside_`, for every shift of a block of keys, the lanes of which the query there has the key in its window.
  void mark_queries(const Block& block) {
    const int64_t columns = part_->columns;
    for (int64_t t = 0; t < block.taps; t++) {
      for (int64_t i = 0; i < N; i++) {
        const int64_t key = block.x + i, query = key - block.first - t;
        const int64_t start = window_start(query, columns, K);
        inside_[t * N + i] = query >= 0 && query < columns && key >= start && key < start + K;
      }
    }
  }
};

template <typename T, typename Real>
int64_t scratch_bytes(const NeighborhoodArgs& args, int64_t most_rows, bool with_backward) {
  return Neighborhood<T, Real>(args, most_rows, with_backward, nullptr).bytes();
}

template <typename T, typename Real>
void forward(const NeighborhoodArgs& args, const NeighborhoodPart& part, void* out, void* scratch) {
  Neighborhood<T, Real>(args, part.most_rows, false, static_cast<char*>(scratch)).forward(part, static_cast<T*>(out));
}

template <typename T, typename Real>
void backward(const NeighborhoodArgs& args, const NeighborhoodPart& part, const NeighborhoodGrads& grads, void* scratch) {
  Neighborhood<T, Real>(args, part.most_rows, true, static_cast<char*>(scratch)).backward(part, grads);
}

template <typename T, typename Real>
void write_pixels(
    const NeighborhoodArgs& args, const void* const* sums, int64_t copies, int64_t pixels, void* to, int64_t step) {
  constexpr int N = kLanes<Real>;
  for (int64_t x = 0; x < pixels; x++) {
    for (int64_t c = 0; c < args.C; c += N) {
      const int64_t place = x * args.C + c, count = args.C - c;
      Vec<Real, N> sum = load_some<Real, Real, N>(static_cast<const Real*>(sums[0]) + place, count);
      for (int64_t i = 1; i < copies; i++) sum += load_some<Real, Real, N>(static_cast<const Real*>(sums[i]) + place, count);
      store_some<T, Real, N>(static_cast<T*>(to) + x * step + c, sum, count);
    }
  }
}

inline int64_t scratch_bytes_any(const NeighborhoodArgs& args, int64_t most_rows, bool with_backward) {
  DAT_FOR_VALUE_TYPE(args.type, scratch_bytes, args, most_rows, with_backward);
}

inline void forward_any(const NeighborhoodArgs& args, const NeighborhoodPart& part, void* out, void* scratch) {
  DAT_FOR_VALUE_TYPE(args.type, forward, args, part, out, scratch);
}

inline void backward_any(
    const NeighborhoodArgs& args, const NeighborhoodPart& part, const NeighborhoodGrads& grads, void* scratch) {
  DAT_FOR_VALUE_TYPE(args.type, backward, args, part, grads, scratch);
}

inline void write_pixels_any(
    const NeighborhoodArgs& args, const void* const* sums, int64_t copies, int64_t pixels, void* to, int64_t step) {
  DAT_FOR_VALUE_TYPE(args.type, write_pixels, args, sums, copies, pixels, to, step);
}

constexpr NeighborhoodKernels kKernels = {scratch_bytes_any, forward_any, backward_any, write_pixels_any};

}  // namespace neighborhood
}  // namespace DAT_ISA
}  // namespace dat
