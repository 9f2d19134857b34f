// Divides the work of the sampling ops among threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace dat {
namespace {

int64_t value_bytes(const SampleArgs& args) {
  switch (args.type) {
    case ValueType::kFloat64: return 8;
    case ValueType::kFloat32: return 4;
    default: return 2;
  }
}

// Tensors without elements have no address, which memset must not be given.
void zero(void* to, int64_t bytes) {
  if (bytes > 0) std::memset(to, 0, bytes);
}

int64_t real_bytes(const SampleArgs& args) { return args.type == ValueType::kFloat64 ? 8 : 4; }

// Queries of an image, `heads` of its heads from `head` on, with its rows where they lie in `value`.
Part make_part(const SampleArgs& args, int64_t image, int64_t head, int64_t heads, int64_t query_begin, int64_t query_end) {
  Part part = {};
  part.image = image, part.head_begin = head, part.head_end = head + heads;
  part.query_begin = query_begin, part.query_end = query_end;
  part.stride = args.H * args.D;
  part.value = static_cast<const char*>(args.value) + (image * args.S * part.stride + head * args.D) * value_bytes(args);
  return part;
}

// Queries first, first + 1, ... of `rows` rows of a map, `columns` of each.
struct Tile {
  int64_t image, first, rows, columns, width;
};

// If every pixel is a query, queries of a tile find each other's pixels in the cache, which queries of a long row do not.
std::vector<Tile> make_tiles(const SampleArgs& args) {
  constexpr int kSide = 16;
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < args.B; b++) {
    for (int64_t l = 0; l < args.L; l++) {
      const Level& level = args.levels[l];
      for (int y = 0; y < level.height; y += kSide) {
        for (int x = 0; x < level.width; x += kSide) {
          const int64_t first = level.start + int64_t(y) * level.width + x;
          tiles.push_back({b, first, std::min(kSide, level.height - y), std::min(kSide, level.width - x), level.width});
        }
      }
    }
  }
  return tiles;
}

void forward_tiles(const SampleArgs& args, void* out) {
  const std::vector<Tile> tiles = make_tiles(args);
  torch::stable::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
    const Bytes scratch = allocate(scratch_bytes(args));
    for (int64_t t = begin; t < end; t++) {
      for (int64_t y = 0; y < tiles[t].rows; y++) {
        const int64_t first = tiles[t].first + y * tiles[t].width;
        const Part part = make_part(args, tiles[t].image, 0, args.H, first, first + tiles[t].columns);
        kernels().sampling.forward(args, part, out, scratch.get());
      }
    }
  });
}

void forward_queries(const SampleArgs& args, void* out) {
  // A thread is worth waking for some ten microseconds of work.
  const int64_t query_work = std::max<int64_t>(1, args.H * args.L * args.P * (args.D + 16));
  const int64_t grain = std::max<int64_t>(1, 65536 / query_work);
  torch::stable::parallel_for(0, args.B * args.Q, grain, [&](int64_t begin, int64_t end) {
    const Bytes scratch = allocate(scratch_bytes(args));
    while (begin < end) {
      const int64_t first = begin % args.Q, last = std::min(args.Q, first + end - begin);
      const Part part = make_part(args, begin / args.Q, 0, args.H, first, last);
      kernels().sampling.forward(args, part, out, scratch.get());
      begin += last - first;
    }
  });
}

// The fewest parts of equal size for each head that keep `threads` threads busy four fifths of the time.
int64_t parts_per_head(int64_t heads, int64_t queries, int64_t threads) {
  int64_t parts = 1;
  const auto rounds = [&] { return (heads * parts + threads - 1) / threads; };
  while (parts < queries && 5 * heads * parts < 4 * rounds() * threads) parts++;
  return parts;
}

// Row 0 of a head in the gradient of `value`.
char* head_rows(const SampleArgs& args, void* grad_value, int64_t head) {
  const int64_t number = (head / args.H * args.S * args.H + head % args.H) * args.D;
  return static_cast<char*>(grad_value) + number * value_bytes(args);
}

// Adds up the sums that the parts of each head took, always in the same order.
void add_parts(const SampleArgs& args, const char* sums, int64_t parts, void* grad_value) {
  const int64_t stride = args.H * args.D, row = args.D * real_bytes(args);
  torch::stable::parallel_for(0, args.B * args.H * args.S, 1024, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t head = begin / args.S, first = begin % args.S, count = std::min(args.S - first, end - begin);
      const char* from = sums + (head * parts * args.S + first) * row;
      char* to = head_rows(args, grad_value, head) + first * stride * value_bytes(args);
      kernels().sampling.write_rows(args, from, parts, args.S * args.D, to, stride, count);
      begin += count;
    }
  });
}

// Every part adds to sums of its own, with a head's rows side by side: H * D numbers apart, often a power of two, they would
// fall into few sets of the cache.
void backward_apart(const SampleArgs& args, const SampleGrads& grads, int64_t parts, void* grad_value) {
  const int64_t heads = args.B * args.H, head_bytes = args.S * args.D * real_bytes(args);
  const Bytes shared = parts > 1 ? allocate(heads * parts * head_bytes) : nullptr;
  torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Bytes scratch = allocate(scratch_bytes(args));
    const Bytes own = parts > 1 ? nullptr : allocate(head_bytes);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t head = unit / parts, index = unit % parts;
      Part part = make_part(args, head / args.H, head % args.H, 1, args.Q * index / parts, args.Q * (index + 1) / parts);
      part.grad_value = parts > 1 ? shared.get() + unit * head_bytes : own.get();
      part.grad_stride = args.D;
      zero(part.grad_value, head_bytes);
      kernels().sampling.backward(args, part, grads, scratch.get());
      if (parts == 1)
        kernels().sampling.write_rows(
            args, part.grad_value, 1, 0, head_rows(args, grad_value, head), args.H * args.D, args.S);
    }
  });
  if (parts > 1) add_parts(args, shared.get(), parts, grad_value);
}

// Used for few samples, for which copying separate sums would take longer than adding to them.
void backward_in_place(const SampleArgs& args, const SampleGrads& grads, void* grad_value) {
  const int64_t row = args.H * args.D, bytes = row * value_bytes(args);
  torch::stable::parallel_for(0, args.B * args.S, 1024, [&](int64_t begin, int64_t end) {
    zero(static_cast<char*>(grad_value) + begin * bytes, (end - begin) * bytes);
  });
  torch::stable::parallel_for(0, args.B * args.H, 1, [&](int64_t begin, int64_t end) {
    const Bytes scratch = allocate(scratch_bytes(args));
    for (int64_t head = begin; head < end; head++) {
      Part part = make_part(args, head / args.H, head % args.H, 1, 0, args.Q);
      part.grad_value = head_rows(args, grad_value, head);
      part.grad_stride = row;
      kernels().sampling.backward(args, part, grads, scratch.get());
    }
  });
}

}  // namespace

void sample_forward(const SampleArgs& args, void* out) {
  // An error in DAT_CPU_CAPABILITY is raised here, before there are threads.
  kernels();
  if (args.L * args.P == 0) {
    // The sum of no samples is zero; where samples are not summed, none are returned.
    if (args.weighted) zero(out, args.B * args.Q * args.H * args.D * value_bytes(args));
    return;
  }
  if (args.B * args.Q * args.H * args.D == 0) return;
  return args.Q == args.S ? forward_tiles(args, out) : forward_queries(args, out);
}

void sample_backward(const SampleArgs& args, const SampleGrads& grads, void* grad_value) {
  if (args.L * args.P == 0) {
    zero(grad_value, args.B * args.S * args.H * args.D * value_bytes(args));
    // Points and boxes that nothing is sampled around still have gradients.
    if (grads.grad_reference)
      zero(grads.grad_reference, args.B * args.Q * args.H * args.L * args.reference_size * real_bytes(args));
    return;
  }
  // Few samples take less time than separate sums, which would have to be divided among threads and converted.
  const bool few = args.Q * args.L * args.P < args.S;
  const int64_t parts = few ? 1 : parts_per_head(args.B * args.H, args.Q, torch::stable::get_num_threads());
  if (few && value_bytes(args) == real_bytes(args))
    backward_in_place(args, grads, grad_value);
  else
    backward_apart(args, grads, parts, grad_value);
}

}  // namespace dat
