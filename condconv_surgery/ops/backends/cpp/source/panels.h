// A convolution whose kernel is mixed anew for each sample, and its gradients, on a CPU in float32:
//
//     y_b = after_b * conv(before_b * x_b, K_b),    K_b = spatial_b * sum_e gate[b,e] * experts[e]
//
// No kernel is ever written to main memory. Two vectors of filters (a "panel") and some channels of all experts are
// packed into the second level of cache, for as many samples as are padded at a time. They are mixed for a few samples
// together, and used at once by a matrix product whose other factor is read directly from the image, at the offsets of
// the taps.
//
// One loop does all arithmetic (``tile``): sum[j][:] += rows[j][offsets[k]] * panel[k][:]. For a convolution a row is a
// position of the output and k runs over channels and taps; for the gradient of the kernel a row is a channel and a tap
// and k runs over the positions; the gradient of the input is a convolution again, with as many phases as the stride
// has.

#pragma once

#include "common.h"

namespace {

constexpr int PIECES = 2;                  // vectors of a row of a panel: a value of the image is used in two products
constexpr int64_t WIDE = PIECES * WIDEST;  // filters of a panel
// Rows of a tile, limited by registers: 12 sums, 2 pieces and 1 value of 16; with AVX-512, by those for pointers.
constexpr int TALL = WIDEST > LANES ? 8 : 6;
constexpr int64_t DEPTH = 144;         // rows of a panel: 18 KB, half of a first level of cache; 9 KB with AVX2
constexpr int64_t ROWS_OF_ALL = 2592;  // experts together: 332 KB, which the second level holds beside the rest; 166 KB
constexpr int64_t SAMPLES = 4;         // mixed together, and whose gradients of kernels are added to those of experts
constexpr int64_t POINTWISE_DEPTH = 80;  // of 1x1: each reads cache lines of its own, 16 KB of them at 7 px

// What a tile prefetches while it computes. The rows of the next tile, at every k, or at every second where
// neighbours in k lie on the same lines; OWN: where rows are far apart, each on lines of its own, as many lines of one.
// LINES, MORE_LINES: the rows at every second k, in between one line of something else, or two.
enum class Ask { EVERY, SECOND, OWN, LINES, MORE_LINES };

// Cache lines, as offsets in floats from a base, of which one or two are prefetched in each iteration of a tile.
struct Lines {
  const float* from = nullptr;
  const int64_t* offsets = nullptr;
  int64_t count = 0, at_once = 1;
};

// FULL: the vectors of a row that are filters; memory beyond them is not touched.
template <int ROWS, int FULL, Ask ASK>
void tile(const float* base, const int64_t* rows, const int64_t* offsets, int64_t depth, const float* panel, float* sum,
          int64_t ahead, const float* from, const int64_t* lines) {
  Widest c[ROWS][FULL];
  const float* r[ROWS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; j++) {
    r[j] = base + rows[j];
    for (int i = 0; i < FULL; i++) c[j][i] = load_widest(sum + j * WIDE + i * WIDEST);
  }
  const float* next = r[0] + ahead;
  constexpr int64_t spread = ASK == Ask::OWN ? TALL : 1;
  auto add = [&](int64_t o, const float* of_panel) {
    Widest w[FULL];
    for (int i = 0; i < FULL; i++) w[i] = load_widest(of_panel + i * WIDEST);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; j++) {
      const float a = r[j][o];
      for (int i = 0; i < FULL; i++) c[j][i] += a * w[i];
    }
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, panel += 2 * WIDE) {
    __builtin_prefetch(next + spread * offsets[k]);
    if (ASK == Ask::MORE_LINES) __builtin_prefetch(from + *lines++, 0, 2);  // into the second level
    add(offsets[k], panel);
    if (ASK == Ask::LINES || ASK == Ask::MORE_LINES) __builtin_prefetch(from + *lines++, 0, 2);
    if (ASK == Ask::EVERY || ASK == Ask::OWN) __builtin_prefetch(next + spread * offsets[k + 1]);
    add(offsets[k + 1], panel + WIDE);
  }
  if (k < depth) add(offsets[k], panel);
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; j++)
    for (int i = 0; i < FULL; i++) store_widest(sum + j * WIDE + i * WIDEST, c[j][i]);
}

template <int FULL, Ask ASK, int... I>
constexpr std::array<decltype(&tile<1, FULL, ASK>), TALL> tiles_by_rows(std::integer_sequence<int, I...>) {
  return {tile<I + 1, FULL, ASK>...};
}
template <int FULL, Ask ASK>
constexpr auto TILES = tiles_by_rows<FULL, ASK>(std::make_integer_sequence<int, TALL>());

// sum[j][:] += sum_k base[rows[j] + offsets[k]] * panel[k][:] for ``count`` rows and the first ``FULL`` vectors.
// beyond: offset from the base to that of the rows that are read after these.
// lines, then: prefetched meanwhile by full tiles, for later.
template <int FULL, Ask ASK>
void tiles(const float* base, const int64_t* rows, int64_t count, const int64_t* offsets, int64_t depth,
           const float* panel, float* sum, int64_t beyond, Lines lines, Lines then) {
  const int64_t after = beyond + rows[0];
  while (count > 0) {  // as even as possible: a tile of one row waits for its own sums
    const int64_t left = (count + TALL - 1) / TALL, some = (count + left - 1) / left;
    const int64_t next = ASK == Ask::OWN ? some : 2 * some - 1, ahead = (next < count ? rows[next] : after) - rows[0];
    if (lines.count < depth / 2 * lines.at_once) std::swap(lines, then);
    const int64_t prefetched = depth / 2 * lines.at_once;
    if (prefetched > 0 && prefetched <= lines.count) {
      const auto f = (lines.at_once == 1 ? TILES<FULL, Ask::LINES> : TILES<FULL, Ask::MORE_LINES>)[some - 1];
      f(base, rows, offsets, depth, panel, sum, ahead, lines.from, lines.offsets);
      lines.offsets += prefetched, lines.count -= prefetched;
    } else {
      TILES<FULL, ASK>[some - 1](base, rows, offsets, depth, panel, sum, ahead, nullptr, nullptr);
    }
    rows += some, sum += some * WIDE, count -= some;
  }
}

// For a panel with at most one vector of filters only that one is multiplied.
template <Ask ASK>
constexpr auto tiles_for(int64_t filters) {
  return filters > WIDEST ? tiles<PIECES, ASK> : tiles<1, ASK>;
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

// to[j * to_step + i] = scale[j] * from[i * step + j] for i below 8 and j below ``columns``; no scale: ones. Only the
// first ``rows`` of eight are read, the others are zeros.
inline void transpose(const float* from, int64_t step, int64_t rows, const float* scale, float* to, int64_t to_step,
                      int64_t columns) {
  Vec r[LANES], some[LANES] = {};  // only ``some`` has a variable index, so that the others stay in registers
  if (rows == LANES) {
    for (int i = 0; i < LANES; i++) r[i] = load(from + i * step);
  } else {
    for (int i = 0; i < rows; i++) some[i] = load(from + i * step);
    for (int i = 0; i < LANES; i++) r[i] = some[i];
  }
  transpose(r);
  if (columns == LANES) {
    for (int i = 0; i < LANES; i++) store(to + i * to_step, scale ? scale[i] * r[i] : r[i]);
  } else {
    for (int i = 0; i < LANES; i++) some[i] = r[i];
    for (int i = 0; i < columns; i++) store(to + i * to_step, scale ? scale[i] * some[i] : some[i]);
  }
}

// to[k][f] = from[f][k] for the rows of a panel at ``from + f * step``, of which ``count`` exist; the others are zeros.
void transpose_rows(const float* from, int64_t step, int64_t count, int64_t depth, float* to) {
  for (int64_t first = 0; first < WIDE; first += LANES) {
    const int64_t some = std::clamp<int64_t>(count - first, 0, LANES);
    int64_t k = 0;
    for (; some > 0 && k + LANES <= depth; k += LANES)
      transpose(from + first * step + k, step, some, nullptr, to + k * WIDE + first, WIDE, LANES);
    for (; k < depth; k++) {
      store(to + k * WIDE + first, Vec{});
      for (int64_t f = first; f < first + some; f++) to[k * WIDE + f] = from[f * step + k];
    }
  }
}

// to[f][p] = scale[f] * from[p][f] for ``count`` filters of a panel whose rows are ``step`` apart; no scale: ones.
void transpose_back(const float* from, int64_t positions, int64_t count, const float* scale, float* to, int64_t step) {
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t some = std::min(LANES, count - first);
    int64_t p = 0;
    for (; p + LANES <= positions; p += LANES) {
      const float* of_these = scale ? scale + first : nullptr;
      transpose(from + p * WIDE + first, WIDE, LANES, of_these, to + first * step + p, step, some);
    }
    for (; p < positions; p++)
      for (int64_t f = first; f < first + some; f++)
        to[f * step + p] = scale ? scale[f] * from[p * WIDE + f] : from[p * WIDE + f];
  }
}

// The experts [E, O, I/G, kh, kw] as seen by a convolution of x [B, I, H, W], or by its transpose, whose filters are
// the channels of x. filters, channels: of one group. A panel has filters of one group. Only a forward may have experts
// that are rounded.
struct Experts {
  const void* weight;
  Element element;
  const float* scale;  // [E, O], or null
  int64_t groups, experts, filters, channels, taps, expert_step, filter_step, channel_step, panels_of_group;

  Experts(const Weights& t, const View& x, bool transposed)
      : weight(t.data),
        element(t.element),
        scale(t.scale),
        groups(x.size(1) / t.size(2)),
        experts(t.size(0)),
        filters(transposed ? t.size(2) : t.size(1) / groups),
        channels(transposed ? t.size(1) / groups : t.size(2)),
        taps(t.size(3) * t.size(4)),
        expert_step(t.size(1) * t.size(2) * taps),
        filter_step(transposed ? taps : t.size(2) * taps),
        channel_step(transposed ? t.size(2) * taps : taps),
        panels_of_group((filters + WIDE - 1) / WIDE) {}
  int64_t panels() const { return groups * panels_of_group; }
  int64_t all_filters() const { return groups * filters; }
  int64_t all_channels() const { return groups * channels; }
  int64_t count(int64_t panel) const { return std::min(WIDE, filters - first_of_group(panel)); }
  int64_t first_filter(int64_t panel) const { return panel / panels_of_group * filters + first_of_group(panel); }
  int64_t first_channel(int64_t panel) const { return panel / panels_of_group * channels; }
  int64_t start(int64_t panel) const {  // in elements
    const int64_t of_group = filters * channels * taps;
    return panel / panels_of_group * of_group + first_of_group(panel) * filter_step;
  }
  float scale_of(int64_t expert, int64_t filter) const {
    return scale ? scale[expert * all_filters() + filter] : 1.f;
  }

 private:
  int64_t first_of_group(int64_t panel) const { return panel % panels_of_group * WIDE; }
};

// Taps and their positions: all of a convolution; of its transpose those of one phase of the stride.
struct Phase {
  Sizes taps, reach, positions, outputs;  // reach: the offset of a tap in a padded channel; outputs: where results go
  bool in_order = false;                  // the outputs are all positions in order, and not listed
};

struct Chunk {  // of channels: all taps of each
  int64_t first, channels, depth;
};

// At most this many rows, fewer where there are many experts.
std::vector<Chunk> chunks_of(const Experts& experts, int64_t taps, int64_t rows) {
  std::vector<Chunk> chunks;
  const int64_t channels = experts.channels;
  const int64_t most = std::max<int64_t>(1, std::min(rows, ROWS_OF_ALL / experts.experts) / taps);
  for (int64_t c = 0; c < channels; c += most) {
    const int64_t some = std::min(most, channels - c);
    chunks.push_back({c, some, some * taps});
  }
  return chunks;
}

std::vector<Chunk> chunks_of(const Experts& experts, const Phase& phase) {
  return chunks_of(experts, phase.taps.size(), phase.taps.size() == 1 ? POINTWISE_DEPTH : DEPTH);
}

// Packs one expert, or a mixture of all, as a panel [depth][WIDE].
class Packer {
 public:
  Packer(const Experts& e, const Phase& phase, int64_t most)
      : experts_(e), phase_(phase), contiguous_(e.channel_step == e.taps && (int64_t)phase.taps.size() == e.taps) {
    if (contiguous_)
      rows_.resize(WIDE * most);
    else
      at_.resize(most);
    gates_.resize(e.experts);
  }

  void pack(int64_t panel, const Chunk& chunk, int64_t expert, float* to) {
    const int64_t first = start(panel, chunk) + expert * experts_.expert_step, count = experts_.count(panel);
    if (experts_.element != Element::FLOAT32) {  // of a forward, so contiguous
      typed(experts_.element, experts_.weight, [&](auto* weight) { to_floats(weight + first, panel, chunk, expert); });
      return transpose_rows(rows_.data(), chunk.depth, count, chunk.depth, to);
    }
    const float* from = static_cast<const float*>(experts_.weight) + first;
    if (contiguous_) return transpose_rows(from, experts_.filter_step, count, chunk.depth, to);
    if ((int64_t)phase_.taps.size() == experts_.taps) {
      for (int64_t c = 0; c < chunk.channels; c++)
        pack_channel(from + c * experts_.channel_step, count, to + c * experts_.taps * WIDE);
      return;
    }
    find(chunk);
    if (count < WIDE) std::fill_n(to, chunk.depth * WIDE, 0.f);
    for (int64_t k = 0; k < chunk.depth; k++)
      for (int64_t f = 0; f < count; f++) to[k * WIDE + f] = from[f * experts_.filter_step + at_[k]];
  }

  // For few samples: mix first, then transpose.
  bool mixes() const { return contiguous_; }
  void pack_mixed(int64_t panel, const Chunk& chunk, const float* gate, float* to) {
    typed(experts_.element, experts_.weight,
          [&](auto* weight) { mix_rows(weight + start(panel, chunk), panel, chunk, gate); });
    transpose_rows(rows_.data(), chunk.depth, experts_.count(panel), chunk.depth, to);
  }

  // The cache lines that will be read for some panels of a chunk, as offsets from the first; mixes: by ``mix``.
  const float* lines_of(int64_t panel, int64_t panels, const Chunk& chunk, Sizes& lines) const {
    const int64_t bytes = bytes_of(experts_.element), of_float = sizeof(float);
    const int64_t of_row = (chunk.depth * bytes + LINE * of_float - 1) / (LINE * of_float);
    const int64_t filters = (panels - 1) * WIDE + experts_.count(panel + panels - 1);
    lines.resize(filters * experts_.experts * of_row);
    int64_t* line = lines.data();
    for (int64_t f = 0; f < filters; f++)
      for (int64_t e = 0; e < experts_.experts; e++) {
        const int64_t row = f * experts_.filter_step + e * experts_.expert_step;
        for (int64_t k = 0; k < of_row; k++) *line++ = row * bytes / of_float + k * LINE;
      }
    return static_cast<const float*>(experts_.weight) + start(panel, chunk) * bytes / of_float;
  }

  // grad[e][filter][channel][tap] = panel[k][f]: the inverse of ``pack``, for whole kernels.
  void unpack(int64_t panel, const Chunk& chunk, int64_t expert, const float* from, float* grad) const {
    float* to = grad + start(panel, chunk) + expert * experts_.expert_step;
    transpose_back(from, chunk.depth, experts_.count(panel), nullptr, to, experts_.filter_step);
  }

 private:
  int64_t start(int64_t panel, const Chunk& chunk) const {
    return experts_.start(panel) + chunk.first * experts_.channel_step;
  }
  // rows_[f][k] = sum_e gate[e] * scale[e][f] * from[e][f][k]
  template <typename T>
  void mix_rows(const T* from, int64_t panel, const Chunk& chunk, const float* gate) {
    const int64_t count = experts_.count(panel), first = experts_.first_filter(panel);
    for (int64_t f = 0; f < count; f++) {
      const T* w = from + f * experts_.filter_step;
      float* row = rows_.data() + f * chunk.depth;
      const float* scaled = gate;
      if (experts_.scale) {
        for (int64_t e = 0; e < experts_.experts; e++) gates_[e] = gate[e] * experts_.scale_of(e, first + f);
        scaled = gates_.data();
      }
      int64_t k = 0;
      for (; k + 2 * WIDEST <= chunk.depth; k += 2 * WIDEST) {
        Widest first = scaled[0] * load_widest(w + k), second = scaled[0] * load_widest(w + k + WIDEST);
        const T* expert = w + k;
        for (int64_t e = 1; e < experts_.experts; e++) {
          expert += experts_.expert_step;
          first += scaled[e] * load_widest(expert), second += scaled[e] * load_widest(expert + WIDEST);
        }
        store_widest(row + k, first), store_widest(row + k + WIDEST, second);
      }
      for (; k + LANES <= chunk.depth; k += LANES) {
        Vec sum = scaled[0] * load(w + k);
        for (int64_t e = 1; e < experts_.experts; e++) sum += scaled[e] * load(w + e * experts_.expert_step + k);
        store(row + k, sum);
      }
      for (; k < chunk.depth; k++) {
        row[k] = 0.f;
        for (int64_t e = 0; e < experts_.experts; e++) row[k] += scaled[e] * as_float(w[e * experts_.expert_step + k]);
      }
    }
  }
  // rows_[f][k] = scale[expert][f] * from[f][k]
  template <typename T>
  void to_floats(const T* from, int64_t panel, const Chunk& chunk, int64_t expert) {
    const int64_t count = experts_.count(panel), first = experts_.first_filter(panel);
    for (int64_t f = 0; f < count; f++) {
      const T* w = from + f * experts_.filter_step;
      const float scale = experts_.scale_of(expert, first + f);
      float* row = rows_.data() + f * chunk.depth;
      int64_t k = 0;
      for (; k + LANES <= chunk.depth; k += LANES) store(row + k, scale * load(w + k));
      for (; k < chunk.depth; k++) row[k] = scale * as_float(w[k]);
    }
  }
  // All taps of a channel, which are contiguous; one tap of the filters too.
  void pack_channel(const float* from, int64_t count, float* to) const {
    if (experts_.taps > 1) return transpose_rows(from, experts_.filter_step, count, experts_.taps, to);
    std::fill(std::copy_n(from, count, to), to + WIDE, 0.f);
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
  std::vector<float> rows_, gates_;
};

// For each of some samples: mixed[k][f] = sum_e gate[e] * panels[e][k][f]. The panels of two experts, and those of two
// samples, are ``step`` apart. An expert is read once for all samples: it comes from the second level of cache.
template <int SOME>
void mix(const float* panels, int64_t step, int64_t experts, const float* gate, int64_t depth, float* mixed) {
  for (int64_t k = 0; k < depth; k++, panels += WIDE, mixed += WIDE) {
    Widest sum[SOME][PIECES] = {};  // of four samples, as many as a processor has products in flight
    const float* expert = panels;
    for (int64_t e = 0; e < experts; e++, expert += step) {
      const Widest of[PIECES] = {load_widest(expert), load_widest(expert + WIDEST)};
#pragma GCC unroll 4
      for (int b = 0; b < SOME; b++) {
        const float g = gate[b * experts + e];
        for (int i = 0; i < PIECES; i++) sum[b][i] += g * of[i];
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < SOME; b++)
      for (int i = 0; i < PIECES; i++) store_widest(mixed + b * step + i * WIDEST, sum[b][i]);
  }
}

constexpr decltype(&mix<1>) MIXES[SAMPLES] = {mix<1>, mix<2>, mix<3>, mix<4>};  // by samples

// to[k] = from[k] times a scale of the tap and one of the channel of row k; null: ones.
void scale_rows(const float* spatial, const float* before, const Sizes& taps, int64_t depth, const float* from,
                float* to) {
  for (int64_t k = 0, channel = 0; k < depth; channel++)
    for (const int64_t tap : taps) {
      const float scale = (spatial ? spatial[tap] : 1.f) * (before ? before[channel] : 1.f);
      for (int i = 0; i < PIECES; i++, from += WIDEST, to += WIDEST) store_widest(to, scale * load_widest(from));
      k++;
    }
}

// Samples with zero padding, scaled by channel; without padding the samples themselves.
struct Image {
  const float* data;
  int64_t row, channel, sample;  // strides in floats

  Image(const float* from, int64_t B, int64_t I, int64_t H, int64_t W, const float* scale, PadAmounts m) {
    row = m.left + W + m.right;
    channel = (m.top + H + m.bottom) * row;
    data = from;
    if (m.any()) {
      channel = (channel + 15) / 16 * 16;
      if (channel / 16 % 2 == 0) channel += 16;  // an odd number of cache lines: channels share no cache set
      held_ = Scratch(B * I * channel);
      float* to = held_.data();
      parallel_for(0, B * I, 16, [&](int64_t begin, int64_t end) {
        for (int64_t map = begin; map < end; map++)
          copy(from + map * H * W, H, W, scale ? scale[map] : 1.f, m, to + map * channel);
      });
      data = to;
    }
    sample = I * channel;
  }

 private:
  void copy(const float* from, int64_t H, int64_t W, float scale, PadAmounts m, float* to) const {
    to = std::fill_n(to, m.top * row, 0.f);
    for (int64_t h = 0; h < H; h++, from += W) {
      to = std::fill_n(to, m.left, 0.f);
      for (int64_t w = 0; w < W; w++) to[w] = scale * from[w];
      to = std::fill_n(to + W, m.right, 0.f);
    }
    std::fill_n(to, m.bottom * row, 0.f);
  }

  Scratch held_;
};

// base[c * channel + reach of the tap] for the channels of a chunk, counted from its first.
Sizes offsets_of(const Chunk& chunk, const Phase& phase, int64_t channel) {
  Sizes offsets;
  offsets.reserve(chunk.depth);
  for (int64_t c = 0; c < chunk.channels; c++)
    for (const int64_t reach : phase.reach) offsets.push_back(c * channel + reach);
  return offsets;
}

}  // namespace
