// Dense layers: the convolution, and the gradient of its input, which is a convolution too.

#pragma once

#include "panels.h"

namespace {

constexpr int64_t FEW_SAMPLES = 4;  // whose kernels are mixed from the experts as they lie, before a panel is made
constexpr int64_t PARTS = 4;        // of a panel's positions, that threads may have the same to do
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
  Lines lines;
};

// What a thread adds up: panels that share what they read, all samples of a time, positions.
struct Unit {
  int64_t panel, panels, first, last, from, to;
};

// The lines of a chunk of a sample, one after the other, and of what follows until whole tiles have asked for them.
void lines_of_channels(const Chunk& chunk, const Picture& picture, Lines& lines) {
  const int64_t count = (chunk.channels * picture.channel + LINE - 1) / LINE,
                turns = std::max<int64_t>(1, chunk.depth / 2);
  lines.offsets.resize((count + turns - 1) / turns * turns);
  for (size_t i = 0; i < lines.offsets.size(); i++) lines.offsets[i] = i * LINE;
}

// The sums of one sample and panel to the maps of y from the given one on.
void write_sums(const Phase& phase, const float* sum, const Unit& unit, int64_t count, int64_t map, const float* after,
                float* y, int64_t size) {
  const float* scale = after ? after + map : nullptr;
  if (phase.in_order) return transpose_back(sum, unit.to - unit.from, count, scale, y + map * size + unit.from, size);
  for (int64_t f = 0; f < count; f++) {
    float* out = y + (map + f) * size;
    for (int64_t p = unit.from; p < unit.to; p++)
      out[phase.outputs[p]] = (scale ? scale[f] : 1.f) * sum[(p - unit.from) * WIDE + f];
  }
}

// y[b, filter, outputs[p]] = after * sum over channels and taps, for the filters, samples and positions of a unit.
void convolve_unit(const Experts& experts, const Phase& phase, const Picture& picture, const Gates& gates,
                   const Unit& unit, float* y, int64_t size, Room& room) {
  const int64_t n = unit.last - unit.first, positions = unit.to - unit.from;
  const auto chunks = chunks_of(experts, phase);
  const int64_t step = chunks[0].depth * WIDE, of_panel = experts.experts * step;
  auto& [packer, packed, mixed, sums, lines] = room;
  const Lines none;
  const bool mixed_first = gates.gate && n <= std::min(FEW_SAMPLES, experts.experts) && packer.mixes();
  packed.resize(mixed_first ? 0 : unit.panels * of_panel);
  mixed.resize(SAMPLES * step);
  sums.assign(unit.panels * n * positions * WIDE, 0.f);
  for (size_t i = 0; i < chunks.size(); i++) {
    const Chunk& chunk = chunks[i];
    const Sizes offsets = offsets_of(chunk, phase, picture.channel);
    const float* base = picture.data + chunk.first * picture.channel;
    for (int64_t p = 0; p < unit.panels && !mixed_first; p++)
      for (int64_t e = 0; e < experts.experts; e++)
        packer.pack(unit.panel + p, chunk, e, packed.data() + p * of_panel + e * step);
    lines.offsets.clear();
    // what comes from memory for a single sample: the experts of the next chunk; for others: the next sample
    if (n == 1 && mixed_first && i + 1 < chunks.size()) packer.lines_of(unit.panel, chunks[i + 1], lines);
    if (n > 1) lines_of_channels(chunk, picture, lines);
    for (int64_t first = 0, last; first < n; first = last) {
      last = std::min(first + SAMPLES, n);
      for (int64_t p = 0; p < unit.panels; p++) {
        const float *panels = packed.data() + p * of_panel, *gate = gates.gate;
        if (gate) gate += (unit.first + first) * experts.experts;
        if (gate && !mixed_first)
          MIXES[last - first - 1](panels, step, experts.experts, gate, chunk.depth, mixed.data());
        for (int64_t b = first; b < last; b++) {
          float* own = mixed.data() + (b - first) * step;
          if (mixed_first) packer.pack_mixed(unit.panel + p, chunk, gate + (b - first) * experts.experts, own);
          const float* kernel = gate ? own : panels;
          if (gates.spatial) {
            scale_taps(gates.spatial + (unit.first + b) * experts.taps, phase.taps, chunk.depth, kernel, own);
            kernel = own;
          }
          const bool again = b + 1 == last && p + 1 < unit.panels;  // the same samples for the next panel
          const int64_t next = again ? first : std::min(b + 1, n - 1);
          if (n > 1) lines.from = base + next * picture.sample;
          // taps side by side read the same lines
          const auto multiply_tiles = phase.taps.size() == 1 ? tiles<Ask::EVERY> : tiles<Ask::SECOND>;
          multiply_tiles(base + b * picture.sample, phase.positions.data() + unit.from, positions, offsets.data(),
                         chunk.depth, kernel, sums.data() + (p * n + b) * positions * WIDE, (next - b) * picture.sample,
                         p == 0 ? lines : none);
        }
      }
    }
  }
  const float* sum = sums.data();
  for (int64_t p = 0; p < unit.panels; p++)
    for (int64_t b = 0; b < n; b++, sum += positions * WIDE)
      write_sums(phase, sum, unit, experts.count(unit.panel + p),
                 (unit.first + b) * experts.filters + (unit.panel + p) * WIDE, gates.after, y, size);
}

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
  for (int64_t b = 0; b < B; b += some) {
    const int64_t n = std::min(some, B - b);
    const Picture picture(x.narrow(0, b, n), gates.before ? gates.before + b * experts.channels : nullptr, margins);
    for (const Phase& phase : phases) {
      const Shares shares(panels, phase.positions.size(), panels_together(experts, phase.taps.size(), n));
      at::parallel_for(0, shares.count, 1, [&](int64_t begin, int64_t end) {
        Room room{Packer(experts, phase, chunks_of(experts, phase)[0].depth), {}, {}, {}, {}};
        for (int64_t i = begin; i < end; i++)
          shares.for_each_unit(i, [&](int64_t panel, int64_t some, int64_t from, int64_t to) {
            convolve_unit(experts, phase, picture, gates, {panel, some, b, b + n, from, to}, out, height * width, room);
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
