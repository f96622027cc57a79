// A convolution whose kernel is mixed anew for each sample, and its gradients, on a CPU in float32:
//
//     y_b = after_b * conv(before_b * x_b, K_b),    K_b = spatial_b * sum_e gate[b,e] * experts[e]
//
// No kernel is ever written to memory. Sixteen filters ("a panel") and some channels of all experts are brought into
// the second level of cache, for as many samples as are padded at a time; for each they are mixed into the first level
// and used there by a matrix product whose other factor is read straight from the picture, at the offsets of the taps.
//
// One loop does all arithmetic (``tile``): sum[j][:] += rows[j][offsets[k]] * panel[k][:]. For a convolution a row is a
// position of the output and k runs over channels and taps; for the gradient of the kernel a row is a channel and a tap
// and k runs over the positions; the gradient of the input is a convolution again, with as many phases as the stride
// has.

#pragma once

#include "common.h"

namespace {

constexpr int64_t WIDE = 2 * LANES;         // filters of a panel
constexpr int64_t TALL = 6;                 // rows of a tile: 12 sums, 2 of the panel and 1 number fill 16 registers
constexpr int64_t DEPTH = 288;              // rows of a panel: 18 KB, half of a first level of cache
constexpr int64_t ROWS_OF_ALL = 9 * DEPTH;  // experts together: 166 KB, which the second level holds beside the rest
constexpr int64_t POINTWISE_DEPTH = 80;     // of 1x1: each reads cache lines of its own, 16 KB of them at 7 px
constexpr int64_t FEW_SAMPLES = 4;  // whose kernels are mixed from the experts as they lie, before a panel is made
constexpr int64_t TOGETHER = 4;     // panels of 1x1 that read the same channels while they are in the first level
constexpr int64_t POSITIONS = 256;  // of a gradient's panel: 16 KB
// Padded input at a time: what little stays in the second level and needs few pages, but twice the experts, which are
// packed anew for each time; never more than stays in the third.
constexpr int64_t LEAST_INPUT = 2 << 20, MOST_INPUT = 16 << 20;

// ahead: from a row to that which takes its place in the next tile; its numbers are asked for while this one computes.
template <int ROWS>
void tile(const float* base, const int64_t* rows, const int64_t* offsets, int64_t depth, const float* panel, float* sum,
          int64_t ahead) {
  Vec c[ROWS][2];
  const float* r[ROWS];
#pragma GCC unroll 6
  for (int j = 0; j < ROWS; j++) {
    r[j] = base + rows[j];
    c[j][0] = load(sum + j * WIDE);
    c[j][1] = load(sum + j * WIDE + LANES);
  }
  for (int64_t k = 0; k < depth; k++) {
    const Vec left = load(panel + k * WIDE), right = load(panel + k * WIDE + LANES);
    const int64_t o = offsets[k];
    __builtin_prefetch(r[ROWS - 1] + o + ahead);
#pragma GCC unroll 6
    for (int j = 0; j < ROWS; j++) {
      const float a = r[j][o];
      c[j][0] += a * left;
      c[j][1] += a * right;
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < ROWS; j++) {
    store(sum + j * WIDE, c[j][0]);
    store(sum + j * WIDE + LANES, c[j][1]);
  }
}

constexpr decltype(&tile<1>) TILES[TALL] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};  // by rows

// sum[j][:] += sum_k base[rows[j] + offsets[k]] * panel[k][:] for ``count`` rows.
void tiles(const float* base, const int64_t* rows, int64_t count, const int64_t* offsets, int64_t depth,
           const float* panel, float* sum) {
  while (count > 0) {  // the last rows in two halves: a tile of one row waits for its own sums
    const int64_t some = count >= 2 * TALL || count <= TALL ? std::min(count, TALL) : (count + 1) / 2;
    const int64_t ahead = count >= 2 * some ? rows[2 * some - 1] - rows[some - 1] : 0;
    TILES[some - 1](base, rows, offsets, depth, panel, sum, ahead);
    rows += some, sum += some * WIDE, count -= some;
  }
}

inline void transpose(Vec* r) {
  Vec t[LANES], u[LANES];
  for (int i = 0; i < LANES; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// to[k][f] = from[f][k] for 16 rows at ``from + f * step``, of which ``count`` exist; the others are zeros.
void transpose_rows(const float* from, int64_t step, int64_t count, int64_t depth, float* to) {
  int64_t k = 0;
  if (count == WIDE)
    for (; k + LANES <= depth; k += LANES)
      for (int64_t half = 0; half < WIDE; half += LANES) {
        Vec r[LANES];
        for (int i = 0; i < LANES; i++) r[i] = load(from + (half + i) * step + k);
        transpose(r);
        for (int i = 0; i < LANES; i++) store(to + (k + i) * WIDE + half, r[i]);
      }
  for (; k < depth; k++)
    for (int64_t f = 0; f < WIDE; f++) to[k * WIDE + f] = f < count ? from[f * step + k] : 0.f;
}

// to[f][p] = scale[f] * from[p][f] for ``count`` of 16 filters whose rows are ``step`` apart; no scale: ones.
void transpose_back(const float* from, int64_t positions, int64_t count, const float* scale, float* to, int64_t step) {
  int64_t p = 0;
  if (count == WIDE)
    for (; p + LANES <= positions; p += LANES)
      for (int64_t half = 0; half < WIDE; half += LANES) {
        Vec r[LANES];
        for (int i = 0; i < LANES; i++) r[i] = load(from + (p + i) * WIDE + half);
        transpose(r);
        for (int i = 0; i < LANES; i++) store(to + (half + i) * step + p, scale ? scale[half + i] * r[i] : r[i]);
      }
  for (; p < positions; p++)
    for (int64_t f = 0; f < count; f++) to[f * step + p] = scale ? scale[f] * from[p * WIDE + f] : from[p * WIDE + f];
}

// What experts [E, O, I, kh, kw] are to a convolution, or to its transpose, whose filters are the input's channels.
struct Experts {
  const float* weight;
  int64_t experts, filters, channels, taps, expert_step, filter_step, channel_step;

  Experts(const Tensor& t, bool transposed)
      : weight(t.const_data_ptr<float>()),
        experts(t.size(0)),
        filters(t.size(transposed ? 2 : 1)),
        channels(t.size(transposed ? 1 : 2)),
        taps(t.size(3) * t.size(4)),
        expert_step(t.size(1) * t.size(2) * taps),
        filter_step(transposed ? taps : t.size(2) * taps),
        channel_step(transposed ? t.size(2) * taps : taps) {}
  int64_t panels() const { return (filters + WIDE - 1) / WIDE; }
  int64_t count(int64_t panel) const { return std::min(WIDE, filters - panel * WIDE); }
};

// Some taps, and the positions that they serve: all of a convolution; of its transpose those of one phase of the
// stride.
struct Phase {
  Sizes taps, reach, positions, outputs;  // reach: the offset of a tap in a padded channel; outputs: where results go
  bool in_order = false;                  // the outputs are all there are, one after the other, and not listed
};

struct Chunk {  // of channels: all taps of each
  int64_t first, channels, depth;
};

std::vector<Chunk> chunks_of(const Experts& experts, int64_t taps) {
  std::vector<Chunk> chunks;
  const int64_t channels = experts.channels;
  const int64_t rows = taps == 1 ? POINTWISE_DEPTH : std::min(DEPTH, ROWS_OF_ALL / experts.experts);
  const int64_t most = std::max<int64_t>(1, rows / taps);
  for (int64_t c = 0; c < channels; c += most) {
    const int64_t some = std::min(most, channels - c);
    chunks.push_back({c, some, some * taps});
  }
  return chunks;
}

// The numbers of one expert, or of a mixture of all, as a panel [depth][16].
class Packer {
 public:
  Packer(const Experts& e, const Phase& phase, int64_t most)
      : experts_(e), phase_(phase), contiguous_(e.channel_step == e.taps && (int64_t)phase.taps.size() == e.taps) {
    if (contiguous_)
      rows_.resize(WIDE * most);
    else
      at_.resize(most);
  }

  void pack(int64_t panel, const Chunk& chunk, int64_t expert, float* to) {
    const float* from = start(panel, chunk) + expert * experts_.expert_step;
    const int64_t count = experts_.count(panel);
    if (contiguous_) return transpose_rows(from, experts_.filter_step, count, chunk.depth, to);
    if ((int64_t)phase_.taps.size() == experts_.taps) {
      for (int64_t c = 0; c < chunk.channels; c++)
        pack_channel(from + c * experts_.channel_step, count, to + c * experts_.taps * WIDE);
      return;
    }
    find(chunk);
    for (int64_t k = 0; k < chunk.depth; k++)
      for (int64_t f = 0; f < WIDE; f++) to[k * WIDE + f] = f < count ? from[f * experts_.filter_step + at_[k]] : 0.f;
  }

  // For few samples: mixed first, transposed after.
  bool mixes() const { return contiguous_; }
  void pack_mixed(int64_t panel, const Chunk& chunk, const float* gate, float* to) {
    const float* from = start(panel, chunk);
    const int64_t count = experts_.count(panel);
    for (int64_t f = 0; f < count; f++) {
      const float* w = from + f * experts_.filter_step;
      float* row = rows_.data() + f * chunk.depth;
      int64_t k = 0;
      for (; k + LANES <= chunk.depth; k += LANES) {
        Vec sum = gate[0] * load(w + k);
        for (int64_t e = 1; e < experts_.experts; e++) sum += gate[e] * load(w + e * experts_.expert_step + k);
        store(row + k, sum);
      }
      for (; k < chunk.depth; k++) {
        row[k] = 0.f;
        for (int64_t e = 0; e < experts_.experts; e++) row[k] += gate[e] * w[e * experts_.expert_step + k];
      }
    }
    transpose_rows(rows_.data(), chunk.depth, count, chunk.depth, to);
  }

  // grad[e][filter][channel][tap] = panel[k][f]: the inverse of ``pack``, for whole kernels.
  void unpack(int64_t panel, const Chunk& chunk, int64_t expert, const float* from, float* grad) const {
    float* to = grad + (start(panel, chunk) - experts_.weight) + expert * experts_.expert_step;
    transpose_back(from, chunk.depth, experts_.count(panel), nullptr, to, experts_.filter_step);
  }

 private:
  const float* start(int64_t panel, const Chunk& chunk) const {
    return experts_.weight + panel * WIDE * experts_.filter_step + chunk.first * experts_.channel_step;
  }
  // All taps of a channel, which lie one after the other.
  void pack_channel(const float* from, int64_t count, float* to) const {
    if (experts_.taps == 1 && count == WIDE)
      store(to, load(from)), store(to + LANES, load(from + LANES));
    else
      transpose_rows(from, experts_.filter_step, count, experts_.taps, to);
  }
  void find(const Chunk& chunk) {
    int64_t k = 0;
    for (int64_t c = 0; c < chunk.channels; c++)
      for (const int64_t tap : phase_.taps) at_[k++] = c * experts_.channel_step + tap;
  }

  const Experts& experts_;
  const Phase& phase_;
  bool contiguous_;
  Sizes at_;
  std::vector<float> rows_;
};

// mixed[k][f] = sum_e gate[e] * panels[e][k][f], or added to it; the panels of two experts are ``step`` apart.
template <int EXPERTS, bool ADD>
void mix(const float* panels, int64_t step, const float* gate, int64_t depth, float* mixed) {
  for (int64_t k = 0; k < depth * WIDE; k += WIDE) {
    Vec left = gate[0] * load(panels + k), right = gate[0] * load(panels + k + LANES);
    if (ADD) left += load(mixed + k), right += load(mixed + k + LANES);
#pragma GCC unroll 8
    for (int64_t e = 1; e < EXPERTS; e++) {
      left += gate[e] * load(panels + e * step + k);
      right += gate[e] * load(panels + e * step + k + LANES);
    }
    store(mixed + k, left);
    store(mixed + k + LANES, right);
  }
}

template <bool ADD>
constexpr decltype(&mix<1, ADD>) MIXES[8] = {mix<1, ADD>, mix<2, ADD>, mix<3, ADD>, mix<4, ADD>,
                                             mix<5, ADD>, mix<6, ADD>, mix<7, ADD>, mix<8, ADD>};  // by experts

// Eight experts at a time: a longer sum would wait for itself.
void mix_panels(const float* panels, int64_t step, int64_t experts, const float* gate, int64_t depth, float* mixed) {
  for (int64_t e = 0; e < experts; e += 8) {
    const int64_t some = std::min<int64_t>(8, experts - e);
    (e == 0 ? MIXES<false> : MIXES<true>)[some - 1](panels + e* step, step, gate + e, depth, mixed);
  }
}

void scale_taps(const float* spatial, const Sizes& taps, int64_t depth, const float* from, float* to) {
  for (int64_t k = 0; k < depth;)
    for (const int64_t tap : taps) {
      store(to + k * WIDE, spatial[tap] * load(from + k * WIDE));
      store(to + k * WIDE + LANES, spatial[tap] * load(from + k * WIDE + LANES));
      k++;
    }
}

// Samples with margins of zeros, times a number for each channel.
struct Picture {
  Tensor held;
  const float* data;
  int64_t row, channel, sample;  // steps in numbers

  Picture(const Tensor& x, const float* scale, Margins m) {
    const int64_t B = x.size(0), I = x.size(1), H = x.size(2), W = x.size(3);
    row = m.left + W + m.right;
    channel = (m.top + H + m.bottom) * row;
    held = x;
    if (scale || channel != H * W) {
      channel = (channel + 15) / 16 * 16;
      if (channel / 16 % 2 == 0) channel += 16;  // an odd number of cache lines: channels share no cache set
      held = at::empty({B, I, channel}, x.options());
      const float* from = x.const_data_ptr<float>();
      float* to = held.mutable_data_ptr<float>();
      at::parallel_for(0, B * I, 16, [&](int64_t begin, int64_t end) {
        for (int64_t map = begin; map < end; map++)
          copy(from + map * H * W, H, W, scale ? scale[map] : 1.f, m, to + map * channel);
      });
    }
    data = held.const_data_ptr<float>();
    sample = I * channel;
  }

 private:
  void copy(const float* from, int64_t H, int64_t W, float scale, Margins m, float* to) const {
    std::fill(to, to + m.top * row, 0.f);
    to += m.top * row;
    for (int64_t h = 0; h < H; h++, from += W, to += row) {
      std::fill(to, to + m.left, 0.f);
      for (int64_t w = 0; w < W; w++) to[m.left + w] = scale * from[w];
      std::fill(to + m.left + W, to + row, 0.f);
    }
    std::fill(to, to + m.bottom * row, 0.f);
  }
};

// base[c * channel + reach of the tap] for the channels of a chunk, counted from its first.
Sizes offsets_of(const Chunk& chunk, const Phase& phase, int64_t channel) {
  Sizes offsets;
  offsets.reserve(chunk.depth);
  for (int64_t c = 0; c < chunk.channels; c++)
    for (const int64_t reach : phase.reach) offsets.push_back(c * channel + reach);
  return offsets;
}

int64_t samples_at_a_time(const Tensor& x, Margins m, const Experts& experts) {
  const int64_t map = (x.size(2) + m.top + m.bottom) * (x.size(3) + m.left + m.right);
  const int64_t bytes = 4 * experts.experts * experts.filters * experts.channels * experts.taps;
  return std::max<int64_t>(1, std::clamp(2 * bytes, LEAST_INPUT, MOST_INPUT) /
                                  (4 * std::max(x.size(1), TOGETHER * WIDE) * map));  // what is added up is as large
}

// How many panels take turns on what they read; one where each thread has few, or many experts fill the cache.
int64_t panels_together(const Experts& experts, int64_t taps) {
  const bool small = taps == 1 && TOGETHER * POINTWISE_DEPTH * experts.experts <= ROWS_OF_ALL;
  return small && experts.panels() >= 2 * TOGETHER * at::get_num_threads() ? TOGETHER : 1;
}

// What a thread keeps from one panel to the next.
struct Room {
  Packer packer;
  std::vector<float> packed, mixed, sums;
};

// What a thread adds up: panels that share what they read, all samples of a time, positions.
struct Unit {
  int64_t panel, panels, first, last, from, to;
};

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
  const auto chunks = chunks_of(experts, phase.taps.size());
  const int64_t step = chunks[0].depth * WIDE, of_panel = experts.experts * step;
  auto& [packer, packed, mixed, sums] = room;
  const bool mixed_first = gates.gate && n <= std::min(FEW_SAMPLES, experts.experts) && packer.mixes();
  packed.resize(mixed_first ? 0 : unit.panels * of_panel);
  mixed.resize(step);
  sums.assign(unit.panels * n * positions * WIDE, 0.f);
  for (const Chunk& chunk : chunks) {
    const Sizes offsets = offsets_of(chunk, phase, picture.channel);
    for (int64_t p = 0; p < unit.panels && !mixed_first; p++)
      for (int64_t e = 0; e < experts.experts; e++)
        packer.pack(unit.panel + p, chunk, e, packed.data() + p * of_panel + e * step);
    for (int64_t b = 0; b < n; b++)
      for (int64_t p = 0; p < unit.panels; p++) {
        const float* gate = gates.gate ? gates.gate + (unit.first + b) * experts.experts : nullptr;
        const float *panels = packed.data() + p * of_panel, *kernel = gate ? mixed.data() : panels;
        if (mixed_first)
          packer.pack_mixed(unit.panel + p, chunk, gate, mixed.data());
        else if (gate)
          mix_panels(panels, step, experts.experts, gate, chunk.depth, mixed.data());
        if (gates.spatial) {
          scale_taps(gates.spatial + (unit.first + b) * experts.taps, phase.taps, chunk.depth, kernel, mixed.data());
          kernel = mixed.data();
        }
        tiles(picture.data + b * picture.sample + chunk.first * picture.channel, phase.positions.data() + unit.from,
              positions, offsets.data(), chunk.depth, kernel, sums.data() + (p * n + b) * positions * WIDE);
      }
  }
  const float* sum = sums.data();
  for (int64_t p = 0; p < unit.panels; p++)
    for (int64_t b = 0; b < n; b++, sum += positions * WIDE)
      write_sums(phase, sum, unit, experts.count(unit.panel + p),
                 (unit.first + b) * experts.filters + (unit.panel + p) * WIDE, gates.after, y, size);
}

// All phases over all samples, some samples at a time; each thread takes panels, and a part of the positions where
// there are fewer panels than threads.
Tensor convolve_phases(const Tensor& x, const Experts& experts, const Gates& gates, const std::vector<Phase>& phases,
                       Margins margins, int64_t height, int64_t width) {
  const int64_t B = x.size(0), some = samples_at_a_time(x, margins, experts), panels = experts.panels();
  int64_t written = 0;
  for (const Phase& phase : phases) written += phase.positions.size();
  const Sizes shape{B, experts.filters, height, width};
  Tensor y = written == height * width ? at::empty(shape, x.options()) : at::zeros(shape, x.options());
  float* out = y.mutable_data_ptr<float>();
  for (int64_t b = 0; b < B; b += some) {
    const int64_t n = std::min(some, B - b);
    const Picture picture(x.narrow(0, b, n), gates.before ? gates.before + b * experts.channels : nullptr, margins);
    for (const Phase& phase : phases) {
      const int64_t size = phase.positions.size();
      const int64_t together = panels_together(experts, phase.taps.size()), groups = (panels + together - 1) / together;
      const int64_t parts = std::min((at::get_num_threads() + groups - 1) / groups, std::max<int64_t>(1, size / TALL));
      at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
        Room room{Packer(experts, phase, chunks_of(experts, phase.taps.size())[0].depth), {}, {}, {}};
        for (int64_t i = begin; i < end; i++) {
          const int64_t part = i % parts, panel = i / parts * together;
          const Unit unit{
              panel, std::min(together, panels - panel), b, b + n, size * part / parts, size * (part + 1) / parts};
          convolve_unit(experts, phase, picture, gates, unit, out, height * width, room);
        }
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

Tensor convolve(const Tensor& x, const Tensor& experts, const Maybe& gate, const Maybe& spatial, const Maybe& before,
                const Maybe& after, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  const Geometry g = geometry_of(experts, stride, padding, dilation);
  check(x, experts, gate, spatial, before, after, g, false);
  const int64_t height = g.outputs(x.size(2), true), width = g.outputs(x.size(3), false);
  const Phase phase = forward_phase(g, x.size(3) + 2 * g.pw, height, width);
  const Gates gates{data_of(gate), data_of(spatial), data_of(before), data_of(after)};
  return convolve_phases(x, Experts(experts, false), gates, {phase}, {g.ph, g.ph, g.pw, g.pw}, height, width);
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

// to_experts[e] += gate[e] * of_kernel and to_gate[e] += of_kernel . packed[e] for some experts, ``step`` apart.
template <int EXPERTS>
void unmix(const float* of_kernel, const float* gate, const float* packed, int64_t step, int64_t depth,
           float* to_experts, float* to_gate) {
  Vec sums[EXPERTS] = {};
  for (int64_t k = 0; k < depth * WIDE; k += WIDE) {
    const Vec left = load(of_kernel + k), right = load(of_kernel + k + LANES);
#pragma GCC unroll 4
    for (int e = 0; e < EXPERTS; e++) {
      const float g = gate ? gate[e] : 1.f, *from = packed + e * step + k;
      float* to = to_experts + e * step + k;
      store(to, load(to) + g * left);
      store(to + LANES, load(to + LANES) + g * right);
      sums[e] += left * load(from);
      sums[e] += right * load(from + LANES);
    }
  }
  if (to_gate)
    for (int e = 0; e < EXPERTS; e++) to_gate[e] += sum_of(sums[e]);
}

void unmix_panel(const float* of_kernel, const float* gate, const float* packed, int64_t step, int64_t experts,
                 int64_t depth, float* to_experts, float* to_gate) {
  for (int64_t e = 0; e < experts;) {  // four at a time have their sums in registers
    const int64_t some = experts - e >= 4 ? 4 : experts - e >= 2 ? 2 : 1;
    const auto f = some == 4 ? unmix<4> : some == 2 ? unmix<2> : unmix<1>;
    f(of_kernel, gate ? gate + e : nullptr, packed + e * step, step, depth, to_experts + e * step,
      to_gate ? to_gate + e : nullptr);
    e += some;
  }
}

// What one panel and one chunk add up over the samples.
struct Sums {
  float *gate, *spatial, *before, *after;  // [B, E], [B, taps], [B, I], [B, O]: of this unit alone, or null
};

// What a thread keeps from one sample to the next: the gradient of its kernel, its kernel, its gradient transposed.
struct Desk {
  Sizes rows;
  std::vector<float> of_kernel, mixture, side;
};

// The gradients of the kernel's parts for the filters of a panel, the channels of a chunk and one sample. base: its
// channels in the picture.
void differentiate(const Experts& experts, const Phase& phase, const float* base, const Gates& gates, const float* grad,
                   int64_t panel, const Chunk& chunk, int64_t b, const float* packed, float* to_experts,
                   const Sums& sums, Desk& desk) {
  const int64_t n = experts.experts, step = chunk.depth * WIDE, count = experts.count(panel), taps = experts.taps;
  const int64_t positions = phase.positions.size();
  auto& [rows, of_kernel, mixture, side] = desk;
  std::fill(of_kernel.begin(), of_kernel.end(), 0.f);
  const float* grad_maps = grad + (b * experts.filters + panel * WIDE) * positions;
  for (int64_t p = 0; p < positions; p += POSITIONS) {
    const int64_t some = std::min(POSITIONS, positions - p);
    transpose_rows(grad_maps + p, positions, count, some, side.data());
    tiles(base, rows.data(), chunk.depth, phase.positions.data() + p, some, side.data(), of_kernel.data());
  }
  const float* gate = gates.gate ? gates.gate + b * n : nullptr;
  const float* spatial = gates.spatial ? gates.spatial + b * taps : nullptr;
  const float* before = gates.before ? gates.before + b * experts.channels + chunk.first : nullptr;
  if (spatial || before || gates.after) {
    Vec after[2] = {Vec{} + 1.f, Vec{} + 1.f}, to_after[2] = {{}, {}};
    if (gates.after)
      for (int64_t f = 0; f < WIDE; f++)
        after[f / LANES][f % LANES] = f < count ? gates.after[b * experts.filters + panel * WIDE + f] : 0.f;
    const float* mixed = gate ? mixture.data() : packed;
    if (gate) mix_panels(packed, step, n, gate, chunk.depth, mixture.data());
    for (int64_t k = 0, channel = 0, tap = 0; k < chunk.depth; k++) {
      Vec d[2] = {load(of_kernel.data() + k * WIDE), load(of_kernel.data() + k * WIDE + LANES)};
      const float s = spatial ? spatial[tap] : 1.f, c = before ? before[channel] : 1.f;
      const Vec product[2] = {d[0] * load(mixed + k * WIDE), d[1] * load(mixed + k * WIDE + LANES)};
      const float left = sum_of(product[0] * after[0] + product[1] * after[1]);
      if (sums.before) sums.before[b * experts.channels + chunk.first + channel] += left * s;
      if (sums.spatial) sums.spatial[b * taps + tap] += left * c;
      for (int h = 0; h < 2; h++) {
        to_after[h] += product[h] * (s * c);
        store(of_kernel.data() + k * WIDE + h * LANES, d[h] * after[h] * (s * c));
      }
      if (++tap == taps) tap = 0, channel++;
    }
    if (sums.after)
      for (int64_t f = 0; f < count; f++)
        sums.after[b * experts.filters + panel * WIDE + f] += to_after[f / LANES][f % LANES];
  }
  unmix_panel(of_kernel.data(), gate, packed, step, n, chunk.depth, to_experts,
              sums.gate ? sums.gate + b * n : nullptr);
}

// The gradients of the experts and of the gate, spatial, before and after parts; an undefined one where a part is
// absent.
std::vector<Tensor> kernel_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight, const Maybe& gate,
                                     const Maybe& spatial, const Maybe& before, const Maybe& after, const Sizes& stride,
                                     const Sizes& padding, const Sizes& dilation) {
  const Geometry g = geometry_of(weight, stride, padding, dilation);
  check(x, weight, gate, spatial, before, after, g, false);
  check_gradient(grad, x, weight, g);
  const Experts experts(weight, false);
  const Margins margins{g.ph, g.ph, g.pw, g.pw};
  const Phase phase = forward_phase(g, x.size(3) + 2 * g.pw, grad.size(2), grad.size(3));
  const auto chunks = chunks_of(experts, experts.taps);
  const int64_t B = x.size(0), some = samples_at_a_time(x, margins, experts), panels = experts.panels(),
                parts = chunks.size();
  const Gates gates{data_of(gate), data_of(spatial), data_of(before), data_of(after)};
  // one slice for each unit that could add to the same numbers at the same time
  auto slices = [&](const Maybe& part, int64_t count) {
    return part ? at::zeros({count, B, part->numel() / B}, x.options()) : Tensor();
  };
  Tensor of_gate = slices(gate, panels * parts), of_spatial = slices(spatial, panels * parts);
  Tensor of_before = slices(before, panels), of_after = slices(after, parts);
  auto slice = [](const Tensor& t, int64_t i) {
    return t.defined() ? t.mutable_data_ptr<float>() + i * t.stride(0) : nullptr;
  };
  Tensor total = at::zeros({panels, experts.experts, experts.channels * experts.taps, WIDE}, x.options());
  Tensor to_experts = at::empty(weight.sizes(), x.options());
  const int64_t together = panels_together(experts, experts.taps), groups = (panels + together - 1) / together;
  const float* from = grad.const_data_ptr<float>();
  float *totals = total.mutable_data_ptr<float>(), *to = to_experts.mutable_data_ptr<float>();
  for (int64_t b = 0; b < B; b += some) {
    const int64_t n = std::min(some, B - b);
    const Picture picture(x.narrow(0, b, n), nullptr, margins);
    at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t part = unit % parts, least = unit / parts * together, most = std::min(panels, least + together);
        const Chunk& chunk = chunks[part];
        const int64_t step = chunk.depth * WIDE, of_panel = experts.experts * step;
        const int64_t positions = phase.positions.size();
        Packer packer(experts, phase, chunk.depth);
        std::vector<float> packed((most - least) * of_panel);
        for (int64_t panel = least; panel < most; panel++)
          for (int64_t e = 0; e < experts.experts; e++)
            packer.pack(panel, chunk, e, packed.data() + (panel - least) * of_panel + e * step);
        Desk desk{offsets_of(chunk, phase, picture.channel), std::vector<float>(step), std::vector<float>(step),
                  std::vector<float>(std::min(positions, POSITIONS) * WIDE)};
        auto of = [&](int64_t panel) {
          return totals + (panel * experts.channels + chunk.first) * experts.taps * WIDE * experts.experts;
        };
        for (int64_t i = 0; i < n; i++)
          for (int64_t panel = least; panel < most; panel++) {
            const int64_t own = panel * parts + part;
            const Sums sums{slice(of_gate, own), slice(of_spatial, own), slice(of_before, panel),
                            slice(of_after, part)};
            differentiate(experts, phase, picture.data + i * picture.sample + chunk.first * picture.channel, gates,
                          from, panel, chunk, b + i, packed.data() + (panel - least) * of_panel, of(panel), sums, desk);
          }
        for (int64_t panel = least; panel < most && b + n == B; panel++)
          for (int64_t e = 0; e < experts.experts; e++) packer.unpack(panel, chunk, e, of(panel) + e * step, to);
      }
    });
  }
  auto added = [](const Tensor& t, const Maybe& part) { return t.defined() ? t.sum(0).view(part->sizes()) : Tensor(); };
  return {to_experts, added(of_gate, gate), added(of_spatial, spatial), added(of_before, before),
          added(of_after, after)};
}

}  // namespace
