// Dense layers: the convolution, and the gradient of its input, which is a convolution too.

#pragma once

#include "panels.h"

namespace {

constexpr int64_t FEW_SAMPLES = 4;  // whose kernels are mixed from the experts as they lie, before a panel is made
constexpr int64_t MOST_POSITIONS = 4096;  // at a time: their sums are 512 KB for a panel, 256 KB with AVX2
constexpr int64_t PARTS = 4;              // of a panel's positions, that threads may have the same to do
// Panels that read the same channels while they are in the first level of cache (1x1), or in the second.
constexpr int64_t POINTWISE_TOGETHER = 4, TOGETHER = 2;
// Padded input at a time: what little stays in the second level and needs few pages, but twice the experts, which are
// packed anew for each time; never more than stays in the third.
constexpr int64_t LEAST_INPUT = 2 << 20, MOST_INPUT = 8 << 20;

int64_t samples_at_a_time(const Tensor& x, Margins m, const Experts& experts) {
  const int64_t map = (x.size(2) + m.top + m.bottom) * (x.size(3) + m.left + m.right);
  const int64_t bytes = 4 * experts.experts * experts.filters * experts.channels * experts.taps;
  const int64_t channels = std::max(x.size(1), POINTWISE_TOGETHER * WIDE);  // what is added up is as large
  return std::max<int64_t>(1, std::clamp(2 * bytes, LEAST_INPUT, MOST_INPUT) / (4 * channels * map));
}

// How many panels take turns on what they read; one where each thread has few, where many experts fill the cache, and
// where of a single sample there is little to read.
int64_t panels_together(const Experts& experts, int64_t taps, int64_t samples) {
  const int64_t most = taps == 1 ? POINTWISE_TOGETHER : TOGETHER, rows = most * (taps == 1 ? POINTWISE_DEPTH : DEPTH);
  const bool small = samples > 1 && rows * experts.experts <= ROWS_OF_ALL;
  return small && experts.panels() >= 2 * most * at::get_num_threads() ? most : 1;
}

// What a thread keeps from one panel to the next.
struct Room {
  Packer packer;
  Numbers packed, mixed, sums;
  Sizes picture_lines, experts_lines;
};

// What a thread adds up: panels that share what they read, all samples of a time, positions.
struct Unit {
  int64_t panel, panels, first, last, from, to;
};

// A unit of work: y[b, filter, outputs[p]] = after * sum over channels and taps.
class UnitConvolution {
 public:
  UnitConvolution(const Experts& experts, const Phase& phase, const Picture& picture, const Gates& gates,
                  const Unit& unit, Room& room)
      : experts_(experts),
        phase_(phase),
        picture_(picture),
        gates_(gates),
        unit_(unit),
        room_(room),
        samples_(unit.last - unit.first),
        positions_(unit.to - unit.from),
        chunks_(chunks_of(experts, phase)),
        step_(chunks_[0].depth * WIDE),
        mixed_first_(gates.gate && samples_ <= std::min(FEW_SAMPLES, experts.experts) && room.packer.mixes()) {
    room_.packed.resize(mixed_first_ ? 0 : unit.panels * experts.experts * step_);
    room_.mixed.resize(SAMPLES * step_);
    room_.sums.assign(unit.panels * samples_ * positions_ * WIDE, 0.f);
  }

  void compute(float* y, int64_t size) {
    for (size_t i = 0; i < chunks_.size(); i++) add(chunks_[i], i + 1 < chunks_.size() ? &chunks_[i + 1] : nullptr);
    for (int64_t p = 0; p < unit_.panels; p++)
      for (int64_t b = 0; b < samples_; b++) write(p, b, y, size);
  }

 private:
  // Some samples at a time, and each panel that takes turns for them.
  void add(const Chunk& chunk, const Chunk* next) {
    const Sizes offsets = offsets_of(chunk, phase_, picture_.channel);
    for (int64_t p = 0; p < unit_.panels && !mixed_first_; p++)
      for (int64_t e = 0; e < experts_.experts; e++)
        room_.packer.pack(unit_.panel + p, chunk, e, packed(p) + e * step_);
    find_lines(chunk, next);
    for (int64_t first = 0; first < samples_; first += SAMPLES) {
      const int64_t last = std::min(first + SAMPLES, samples_);
      for (int64_t p = 0; p < unit_.panels; p++) {
        mix(p, chunk, first, last);
        for (int64_t b = first; b < last; b++) {
          const bool again = b + 1 == last && p + 1 < unit_.panels;  // the same samples for the next panel
          multiply(p, chunk, offsets, b, b - first, again ? first : std::min(b + 1, samples_ - 1));
        }
      }
    }
  }

  // What comes from memory: the chunk of the next sample, line by line and on until whole tiles have asked for them,
  // and the experts of the next chunk.
  void find_lines(const Chunk& chunk, const Chunk* next) {
    const int64_t asked = asked_by_tile(chunk), numbers = asked * LINE;
    const int64_t count = (chunk.channels * picture_.channel + numbers - 1) / numbers * asked;
    room_.picture_lines.resize(samples_ > 1 ? count : 0);
    for (size_t i = 0; i < room_.picture_lines.size(); i++) room_.picture_lines[i] = i * LINE;
    room_.experts_lines.clear();
    if (next && room_.packer.mixes())
      next_experts_ = room_.packer.lines_of(unit_.panel, unit_.panels, *next, room_.experts_lines);
  }

  // The share of a sample in the experts of the next chunk.
  Lines experts_of_next(const Chunk& chunk, int64_t b) const {
    const int64_t asked = asked_by_tile(chunk), tiles = room_.experts_lines.size() / asked;
    const int64_t first = tiles * b / samples_, last = tiles * (b + 1) / samples_;
    return {next_experts_, room_.experts_lines.data() + first * asked, (last - first) * asked, lines_at_once()};
  }

  // The kernels of some samples for a panel.
  void mix(int64_t p, const Chunk& chunk, int64_t first, int64_t last) {
    if (!gates_.gate) return;
    const float* gate = gates_.gate + (unit_.first + first) * experts_.experts;
    float* to = room_.mixed.data();
    if (!mixed_first_) return MIXES[last - first - 1](packed(p), step_, experts_.experts, gate, chunk.depth, to);
    for (int64_t b = first; b < last; b++, gate += experts_.experts, to += step_)
      room_.packer.pack_mixed(unit_.panel + p, chunk, gate, to);
  }

  // The product of a sample, whose kernel has a place among the mixed ones, with a panel; ``next`` is multiplied then.
  void multiply(int64_t p, const Chunk& chunk, const Sizes& offsets, int64_t b, int64_t place, int64_t next) {
    float* own = room_.mixed.data() + place * step_;
    const float* kernel = gates_.gate ? own : packed(p);
    if (gates_.spatial || gates_.before) {
      const int64_t sample = unit_.first + b;
      const float* spatial = gates_.spatial ? gates_.spatial + sample * experts_.taps : nullptr;
      const float* before = gates_.before ? gates_.before + sample * experts_.channels + chunk.first : nullptr;
      scale_rows(spatial, before, phase_.taps, chunk.depth, kernel, own);
      kernel = own;
    }
    const float* base = picture_.data + chunk.first * picture_.channel;
    // the first panel asks for the next sample, the last for the experts
    Lines first, then;
    if (p == 0 && b + 1 < samples_)
      first = {base + (b + 1) * picture_.sample, room_.picture_lines.data(), (int64_t)room_.picture_lines.size()};
    if (p + 1 == unit_.panels) then = experts_of_next(chunk, b);
    // taps side by side read the same lines
    const int64_t count = experts_.count(unit_.panel + p);
    const auto multiply_tiles = phase_.taps.size() == 1 ? tiles_for<Ask::EVERY>(count) : tiles_for<Ask::SECOND>(count);
    multiply_tiles(base + b * picture_.sample, phase_.positions.data() + unit_.from, positions_, offsets.data(),
                   chunk.depth, kernel, sums(p, b), (next - b) * picture_.sample, first, then);
  }

  // The sums of a sample and panel to their maps.
  void write(int64_t p, int64_t b, float* y, int64_t size) {
    const int64_t count = experts_.count(unit_.panel + p);
    const int64_t map = (unit_.first + b) * experts_.filters + (unit_.panel + p) * WIDE;
    const float *scale = gates_.after ? gates_.after + map : nullptr, *sum = sums(p, b);
    if (phase_.in_order) return transpose_back(sum, positions_, count, scale, y + map * size + unit_.from, size);
    for (int64_t f = 0; f < count; f++) {
      float* out = y + (map + f) * size;
      for (int64_t i = 0; i < positions_; i++)
        out[phase_.outputs[unit_.from + i]] = (scale ? scale[f] : 1.f) * sum[i * WIDE + f];
    }
  }

  // A single sample has little time for all that it asks for.
  int64_t lines_at_once() const { return samples_ == 1 ? 2 : 1; }
  int64_t asked_by_tile(const Chunk& chunk) const { return std::max<int64_t>(1, chunk.depth / 2 * lines_at_once()); }
  float* packed(int64_t p) { return room_.packed.data() + p * experts_.experts * step_; }
  float* sums(int64_t p, int64_t b) { return room_.sums.data() + (p * samples_ + b) * positions_ * WIDE; }

  const Experts& experts_;
  const Phase& phase_;
  const Picture& picture_;
  const Gates& gates_;
  const Unit& unit_;
  Room& room_;
  const int64_t samples_, positions_;
  const std::vector<Chunk> chunks_;
  const int64_t step_;  // numbers from one expert's panel, or one sample's, to the next
  const bool mixed_first_;
  const float* next_experts_ = nullptr;
};

// What each thread takes: as many panels as the others, to a part of one, whose positions it shares with the next.
struct Shares {
  int64_t panels, positions, together, parts, count;

  Shares(int64_t panels, int64_t positions, int64_t together)
      : panels(panels), positions(positions), together(together) {
    const int64_t threads = at::get_num_threads();
    parts = std::clamp<int64_t>(positions / (2 * TALL), 1, std::max(PARTS, (threads + panels - 1) / panels));
    count = std::min(threads, panels * parts);
  }

  template <typename Use>
  void for_each_unit(int64_t share, Use use) const {
    int64_t part = panels * parts * share / count;
    const int64_t stop = panels * parts * (share + 1) / count;
    while (part < stop) {
      const int64_t panel = part / parts, first = part % parts, whole = first ? 0 : (stop - part) / parts;
      const int64_t some = std::clamp<int64_t>(whole, 1, together);
      const int64_t last = whole ? parts : std::min(parts, first + stop - part);
      use(panel, some, positions * first / parts, positions * last / parts);
      part += whole ? some * parts : last - first;
    }
  }
};

// All phases over all samples, some samples at a time.
Tensor convolve_phases(const Tensor& x, const Experts& experts, const Gates& gates, const std::vector<Phase>& phases,
                       Margins margins, int64_t height, int64_t width) {
  const int64_t B = x.size(0), some = samples_at_a_time(x, margins, experts), panels = experts.panels();
  int64_t written = 0;
  for (const Phase& phase : phases) written += phase.positions.size();
  const Sizes shape{B, experts.filters, height, width};
  Tensor y = in_large_pages(at::empty(shape, x.options()));
  if (written < height * width) y.zero_();
  float* out = y.mutable_data_ptr<float>();
  // a picture that is padded is scaled as it is copied; of another the kernels are, rather than a copy
  const float* before = margins.any() ? gates.before : nullptr;
  const Gates of_kernels{gates.gate, gates.spatial, margins.any() ? nullptr : gates.before, gates.after};
  for (int64_t b = 0; b < B; b += some) {
    const int64_t n = std::min(some, B - b);
    const Picture picture(x.narrow(0, b, n), before ? before + b * experts.channels : nullptr, margins);
    for (const Phase& phase : phases) {
      const Shares shares(panels, phase.positions.size(), panels_together(experts, phase.taps.size(), n));
      at::parallel_for(0, shares.count, 1, [&](int64_t begin, int64_t end) {
        Room room{Packer(experts, phase, chunks_of(experts, phase)[0].depth), {}, {}, {}, {}, {}};
        for (int64_t i = begin; i < end; i++)
          shares.for_each_unit(i, [&](int64_t panel, int64_t some, int64_t from, int64_t to) {
            for (int64_t start = from; start < to; start += MOST_POSITIONS) {
              const Unit unit{panel, some, b, b + n, start, std::min(start + MOST_POSITIONS, to)};
              UnitConvolution(experts, phase, picture, of_kernels, unit, room).compute(out, height * width);
            }
          });
      });
    }
  }
  return y;
}

Phase forward_phase(const Geometry& g, int64_t row, int64_t height, int64_t width) {
  Phase phase;
  for (int64_t i = 0; i < g.kh; i++)
    for (int64_t j = 0; j < g.kw; j++) {
      phase.taps.push_back(i * g.kw + j);
      phase.reach.push_back(i * g.dh * row + j * g.dw);
    }
  phase.positions.reserve(height * width);
  for (int64_t h = 0; h < height; h++)
    for (int64_t w = 0; w < width; w++) phase.positions.push_back(h * g.sh * row + w * g.sw);
  phase.in_order = true;
  return phase;
}

// A kernel of one tap reads no positions but those that the stride meets: here side by side, for a stride of 1.
Tensor met_by_stride(const Tensor& x, Geometry& g) {
  if (g.kh * g.kw > 1 || g.ph + g.pw > 0 || g.sh * g.sw == 1) return x;
  const Tensor met = x.slice(2, 0, x.size(2), g.sh).slice(3, 0, x.size(3), g.sw).contiguous();
  g.sh = g.sw = 1;
  return met;
}

Tensor convolve(const Tensor& x, const Tensor& experts, const Maybe& gate, const Maybe& spatial, const Maybe& before,
                const Maybe& after, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  Geometry g = geometry_of(experts, stride, padding, dilation);
  check(x, experts, gate, spatial, before, after, g, false);
  const Tensor read = met_by_stride(x, g);
  const int64_t height = g.outputs(read.size(2), true), width = g.outputs(read.size(3), false);
  const Phase phase = forward_phase(g, read.size(3) + 2 * g.pw, height, width);
  const Gates gates{data_of(gate), data_of(spatial), data_of(before), data_of(after)};
  return convolve_phases(read, Experts(experts, false), gates, {phase}, {g.ph, g.ph, g.pw, g.pw}, height, width);
}

// The gradient of the input [B, I, H, W] from that of the output.
Tensor input_gradient(const Tensor& grad, const Tensor& x, const Tensor& experts, const Maybe& gate,
                      const Maybe& spatial, const Maybe& before, const Maybe& after, const Sizes& stride,
                      const Sizes& padding, const Sizes& dilation) {
  const Geometry g = geometry_of(experts, stride, padding, dilation);
  check(x, experts, gate, spatial, before, after, g, false);
  check_gradient(grad, x, experts, g);
  const int64_t height = x.size(2), width = x.size(3);
  const Steps tall(g.kh, g.sh, g.ph, g.dh, height, grad.size(2)), wide(g.kw, g.sw, g.pw, g.dw, width, grad.size(3));
  const int64_t row = wide.before + grad.size(3) + wide.after;
  std::vector<Phase> phases;
  for_each_phase(tall, wide, [&](const Step& t, const Step& w) {
    Phase phase;
    phase.in_order = g.sh == 1 && g.sw == 1;
    for (size_t i = 0; i < t.taps.size(); i++)
      for (size_t j = 0; j < w.taps.size(); j++) {
        phase.taps.push_back(t.taps[i] * g.kw + w.taps[j]);
        phase.reach.push_back(t.reach[i] * row + w.reach[j]);
      }
    for (size_t i = 0; i < t.pixels.size(); i++)
      for (size_t j = 0; j < w.pixels.size(); j++) {
        phase.positions.push_back(t.starts[i] * row + w.starts[j]);
        if (!phase.in_order) phase.outputs.push_back(t.pixels[i] * width + w.pixels[j]);
      }
    phases.push_back(phase);
  });
  const Gates gates{data_of(gate), data_of(spatial), data_of(after), data_of(before)};
  const Margins margins{tall.before, tall.after, wide.before, wide.after};
  return convolve_phases(grad, Experts(experts, true), gates, phases, margins, height, width);
}

}  // namespace
