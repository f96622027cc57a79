// Dense layers: the convolution, and the gradient of its input, which is a convolution too.

#pragma once

#include "panels.h"

namespace {

constexpr int64_t FEW_SAMPLES = 4;  // up to here kernels are mixed from the experts unpacked, then packed as a panel
constexpr int64_t MAX_POSITIONS = 4096;  // at a time: their sums are 512 KB for a panel, 256 KB with AVX2
constexpr int64_t FEW_POSITIONS = 128;   // of a single chunk at a time: 16 KB
constexpr int64_t PARTS = 4;             // of a panel's positions, so that threads have equal work
// Panels that read the same channels while they are in the first level of cache (1x1), or in the second.
constexpr int64_t POINTWISE_TOGETHER = 4, TOGETHER = 2;
// Padded input at a time: little enough to stay in the second level of cache and to need few pages, but at least twice
// the experts, which are packed again each time; never more than stays in the third level.
constexpr int64_t LEAST_INPUT = 2 << 20, MOST_INPUT = 8 << 20;

int64_t samples_at_a_time(const View& x, PadAmounts m, const Experts& experts) {
  const int64_t map = (x.size(2) + m.top + m.bottom) * (x.size(3) + m.left + m.right);
  const int64_t bytes = 4 * experts.experts * experts.expert_step;
  const int64_t channels = std::max(x.size(1), POINTWISE_TOGETHER * WIDE);  // the sums are as large
  return std::max<int64_t>(1, std::clamp(2 * bytes, LEAST_INPUT, MOST_INPUT) / (4 * channels * map));
}

// How many panels read the same input in turn: one where each thread has few, where many experts fill the cache, where
// a single sample has little to read, and in groups, each of which has its own input.
int64_t panels_together(const Experts& experts, int64_t taps, int64_t samples) {
  const int64_t most = taps == 1 ? POINTWISE_TOGETHER : TOGETHER, rows = most * (taps == 1 ? POINTWISE_DEPTH : DEPTH);
  const bool small = experts.groups == 1 && samples > 1 && rows * experts.experts <= ROWS_OF_ALL;
  return small && experts.panels() >= 2 * most * condconv::thread_count() ? most : 1;
}

// Buffers of a thread, reused from one panel to the next.
struct ThreadBuffers {
  Packer packer;
  Buffer packed, mixed, sums;
  Sizes image_lines, expert_lines;
};

// A unit of work of a thread: panels that share their input, all samples of this pass, positions.
struct Unit {
  int64_t panel, panels, first, last, from, to;
};

// Computes one unit: y[b, filter, outputs[p]] = after * sum over channels and taps.
class UnitConvolution {
 public:
  UnitConvolution(const Experts& experts, const Phase& phase, const Image& image, const Gates& gates, const Unit& unit,
                  ThreadBuffers& buffers)
      : experts_(experts),
        phase_(phase),
        image_(image),
        gates_(gates),
        unit_(unit),
        buffers_(buffers),
        samples_(unit.last - unit.first),
        positions_(unit.to - unit.from),
        chunks_(chunks_of(experts, phase)),
        step_(chunks_[0].depth * WIDE),
        mixed_first_(gates.gate && samples_ <= std::min(FEW_SAMPLES, experts.experts) && buffers.packer.mixes()) {
    buffers_.packed.resize(mixed_first_ ? 0 : unit.panels * experts.experts * step_);
    buffers_.mixed.resize(std::min(SAMPLES, samples_) * step_);
    const int64_t sums = single() ? std::min(FEW_POSITIONS, positions_) : unit.panels * samples_ * positions_;
    buffers_.sums.assign(sums * WIDE, 0.f);
  }

  void compute(float* y, int64_t size) {
    for (size_t i = 0; i < chunks_.size(); i++)
      add(chunks_[i], i + 1 < chunks_.size() ? &chunks_[i + 1] : nullptr, y, size);
    for (int64_t p = 0; p < unit_.panels && !single(); p++)
      for (int64_t b = 0; b < samples_; b++) write(p, b, 0, positions_, sums(p, b), y, size);
  }

 private:
  // Some samples at a time, and each panel in turn for them.
  void add(const Chunk& chunk, const Chunk* next, float* y, int64_t size) {
    const Sizes offsets = offsets_of(chunk, phase_, image_.channel);
    for (int64_t p = 0; p < unit_.panels && !mixed_first_; p++)
      for (int64_t e = 0; e < experts_.experts; e++)
        buffers_.packer.pack(unit_.panel + p, chunk, e, packed(p) + e * step_);
    find_lines(chunk, next);
    for (int64_t first = 0; first < samples_; first += SAMPLES) {
      const int64_t last = std::min(first + SAMPLES, samples_);
      for (int64_t p = 0; p < unit_.panels; p++) {
        mix(p, chunk, first, last);
        for (int64_t b = first; b < last; b++) {
          const bool again = b + 1 == last && p + 1 < unit_.panels;  // the same samples for the next panel
          multiply(p, chunk, offsets, b, b - first, again ? first : std::min(b + 1, samples_ - 1), y, size);
        }
      }
    }
  }

  // Prefetches: the chunk of the next sample, line by line until full tiles have asked for all, and the experts of the
  // next chunk.
  void find_lines(const Chunk& chunk, const Chunk* next) {
    const int64_t lines = lines_by_tile(chunk), floats = lines * LINE;
    const int64_t count = (chunk.channels * image_.channel + floats - 1) / floats * lines;
    buffers_.image_lines.resize(samples_ > 1 ? count : 0);
    for (size_t i = 0; i < buffers_.image_lines.size(); i++) buffers_.image_lines[i] = i * LINE;
    buffers_.expert_lines.clear();
    if (next && buffers_.packer.mixes())
      next_experts_ = buffers_.packer.lines_of(unit_.panel, unit_.panels, *next, buffers_.expert_lines);
  }

  // The share of a sample in the experts of the next chunk.
  Lines experts_of_next(const Chunk& chunk, int64_t b) const {
    const int64_t lines = lines_by_tile(chunk), tiles = buffers_.expert_lines.size() / lines;
    const int64_t first = tiles * b / samples_, last = tiles * (b + 1) / samples_;
    return {next_experts_, buffers_.expert_lines.data() + first * lines, (last - first) * lines, lines_at_once()};
  }

  // Mixes the kernels of some samples for a panel.
  void mix(int64_t p, const Chunk& chunk, int64_t first, int64_t last) {
    if (!gates_.gate) return;
    const float* gate = gates_.gate + (unit_.first + first) * experts_.experts;
    float* to = buffers_.mixed.data();
    if (!mixed_first_) return MIXES[last - first - 1](packed(p), step_, experts_.experts, gate, chunk.depth, to);
    for (int64_t b = first; b < last; b++, gate += experts_.experts, to += step_)
      buffers_.packer.pack_mixed(unit_.panel + p, chunk, gate, to);
  }

  // Multiplies a sample by its mixed kernel, for a panel; ``next`` is the sample after it.
  void multiply(int64_t p, const Chunk& chunk, const Sizes& offsets, int64_t b, int64_t place, int64_t next, float* y,
                int64_t size) {
    float* own = buffers_.mixed.data() + place * step_;
    const float* kernel = gates_.gate ? own : packed(p);
    const int64_t channel = experts_.first_channel(unit_.panel) + chunk.first;
    if (gates_.spatial || gates_.before) {
      const int64_t sample = unit_.first + b;
      const float* spatial = gates_.spatial ? gates_.spatial + sample * experts_.taps : nullptr;
      const float* before = gates_.before ? gates_.before + sample * experts_.all_channels() + channel : nullptr;
      scale_rows(spatial, before, phase_.taps, chunk.depth, kernel, own);
      kernel = own;
    }
    const float* base = image_.data + channel * image_.channel;
    // the first panel asks for the next sample, the last for the experts
    Lines first, then;
    if (p == 0 && b + 1 < samples_)
      first = {base + (b + 1) * image_.sample, buffers_.image_lines.data(), (int64_t)buffers_.image_lines.size()};
    if (p + 1 == unit_.panels) then = experts_of_next(chunk, b);
    // neighbouring taps read the same cache lines
    const int64_t count = experts_.count(unit_.panel + p);
    const auto multiply_tiles = phase_.taps.size() == 1 ? tiles_for<Ask::EVERY>(count) : tiles_for<Ask::SECOND>(count);
    const float* image = base + b * image_.sample;
    const int64_t *positions = phase_.positions.data() + unit_.from, beyond = (next - b) * image_.sample;
    const int64_t* offset = offsets.data();
    if (!single())
      return multiply_tiles(image, positions, positions_, offset, chunk.depth, kernel, sums(p, b), beyond, first, then);
    // the sums of a single chunk are written at once, from the first level of cache
    float* few = buffers_.sums.data();
    for (int64_t from = 0; from < positions_; from += FEW_POSITIONS) {
      const int64_t to = std::min(from + FEW_POSITIONS, positions_);
      const int64_t after = to < positions_ ? positions[to] - positions[from] : beyond;
      std::fill_n(few, (to - from) * WIDE, 0.f);
      const Lines lines = from == 0 ? first : Lines();
      multiply_tiles(image, positions + from, to - from, offset, chunk.depth, kernel, few, after, lines, {});
      write(p, b, from, to, few, y, size);
    }
  }

  // Writes the sums of a sample and panel for some positions to their output maps.
  void write(int64_t p, int64_t b, int64_t from, int64_t to, const float* sum, float* y, int64_t size) const {
    const int64_t count = experts_.count(unit_.panel + p);
    const int64_t map = (unit_.first + b) * experts_.all_filters() + experts_.first_filter(unit_.panel + p);
    const float* scale = gates_.after ? gates_.after + map : nullptr;
    const int64_t start = unit_.from + from;
    if (phase_.in_order) return transpose_back(sum, to - from, count, scale, y + map * size + start, size);
    for (int64_t f = 0; f < count; f++) {
      float* out = y + (map + f) * size;
      for (int64_t i = 0; i < to - from; i++)
        out[phase_.outputs[start + i]] = (scale ? scale[f] : 1.f) * sum[i * WIDE + f];
    }
  }

  // A single sample has little time to prefetch everything.
  int64_t lines_at_once() const { return samples_ == 1 ? 2 : 1; }
  int64_t lines_by_tile(const Chunk& chunk) const { return std::max<int64_t>(1, chunk.depth / 2 * lines_at_once()); }
  float* packed(int64_t p) { return buffers_.packed.data() + p * experts_.experts * step_; }
  float* sums(int64_t p, int64_t b) { return buffers_.sums.data() + (p * samples_ + b) * positions_ * WIDE; }
  bool single() const { return chunks_.size() == 1; }

  const Experts& experts_;
  const Phase& phase_;
  const Image& image_;
  const Gates& gates_;
  const Unit& unit_;
  ThreadBuffers& buffers_;
  const int64_t samples_, positions_;
  const std::vector<Chunk> chunks_;
  const int64_t step_;  // floats from one expert's panel, or one sample's, to the next
  const bool mixed_first_;
  const float* next_experts_ = nullptr;
};

// The share of each thread: equal numbers of panels, down to parts of one, whose positions two threads share.
struct Shares {
  int64_t panels, positions, together, parts, count;

  Shares(int64_t panels, int64_t positions, int64_t together)
      : panels(panels), positions(positions), together(together) {
    const int64_t threads = condconv::thread_count();
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

// All phases over all samples, some samples at a time, to y [B, filters, height, width].
void convolve_phases(const View& x, const Experts& experts, const Gates& gates, const std::vector<Phase>& phases,
                     PadAmounts pads, int64_t height, int64_t width, float* y) {
  const int64_t B = x.size(0), I = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t some = samples_at_a_time(x, pads, experts), panels = experts.panels();
  int64_t written = 0;
  for (const Phase& phase : phases) written += phase.positions.size();
  const int64_t count = B * experts.all_filters() * height * width;
  in_large_pages(y, count);
  if (written < height * width) std::fill_n(y, count, 0.f);
  // a padded image is scaled while it is copied; without padding the kernels are scaled, which saves the copy
  const float* before = pads.any() ? gates.before : nullptr;
  const Gates of_kernels{gates.gate, gates.spatial, pads.any() ? nullptr : gates.before, gates.after};
  for (int64_t b = 0; b < B; b += some) {
    const int64_t n = std::min(some, B - b);
    const Image image(x.data + b * I * H * W, n, I, H, W, before ? before + b * I : nullptr, pads);
    for (const Phase& phase : phases) {
      const Shares shares(panels, phase.positions.size(), panels_together(experts, phase.taps.size(), n));
      parallel_for(0, shares.count, 1, [&](int64_t begin, int64_t end) {
        ThreadBuffers buffers{Packer(experts, phase, chunks_of(experts, phase)[0].depth), {}, {}, {}, {}, {}};
        for (int64_t i = begin; i < end; i++)
          shares.for_each_unit(i, [&](int64_t panel, int64_t some, int64_t from, int64_t to) {
            for (int64_t start = from; start < to; start += MAX_POSITIONS) {
              const Unit unit{panel, some, b, b + n, start, std::min(start + MAX_POSITIONS, to)};
              UnitConvolution(experts, phase, image, of_kernels, unit, buffers).compute(y, height * width);
            }
          });
      });
    }
  }
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

// A 1x1 kernel reads only the positions that the stride visits: copied contiguously, for a stride of 1.
struct Visited {
  View x;
  Geometry g;

  Visited(const View& all, const Geometry& geometry) : x(all), g(geometry) {
    if (g.kh * g.kw > 1 || g.ph + g.pw > 0 || g.sh * g.sw == 1) return;
    const int64_t H = all.size(2), W = all.size(3), height = g.outputs(H, true), width = g.outputs(W, false);
    held_ = Scratch(all.size(0) * all.size(1) * height * width);
    parallel_for(0, all.size(0) * all.size(1), 1 + 4096 / (height * width), [&](int64_t begin, int64_t end) {
      float* to = held_.data() + begin * height * width;
      for (int64_t map = begin; map < end; map++)
        for (int64_t h = 0; h < height; h++)
          for (int64_t w = 0; w < width; w++) *to++ = all.data[(map * H + h * g.sh) * W + w * g.sw];
    });
    x = {held_.data(), {all.size(0), all.size(1), height, width}};
    g.sh = g.sw = 1;
  }

 private:
  Scratch held_;
};

void convolve(const View& all, const Weights& experts, const Gates& gates, const Geometry& geometry, float* y) {
  const Visited visited(all, geometry);
  const View& x = visited.x;
  const Geometry& g = visited.g;
  const int64_t height = g.outputs(x.size(2), true), width = g.outputs(x.size(3), false);
  const Phase phase = forward_phase(g, x.size(3) + 2 * g.pw, height, width);
  convolve_phases(x, Experts(experts, x, false), gates, {phase}, {g.ph, g.ph, g.pw, g.pw}, height, width, y);
}

// The gradient of the input [B, I, H, W] from that of the output.
void input_gradient(const View& grad, const View& x, const View& experts, const Gates& gates, const Geometry& g,
                    float* to_x) {
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
  const Gates transposed{gates.gate, gates.spatial, gates.after, gates.before};
  const PadAmounts pads{tall.before, tall.after, wide.before, wide.after};
  convolve_phases(grad, Experts(experts, x, true), transposed, phases, pads, height, width, to_x);
}

}  // namespace
