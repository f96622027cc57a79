// A depthwise convolution whose kernel is mixed anew for each sample, and its gradients, on a CPU in float32:
//
//     y[b,c] = conv(x[b,c], K[b,c]),    K[b,c] = after[b,c] * before[b,c] * spatial_b * sum_e gate[b,e] * experts[e,c]
//
// One map at a time: it is copied with zero padding into the second level of cache, and there each tap of the kernel is
// one value times eight neighbouring positions. With a stride the map is copied such that these eight are contiguous
// too.

#pragma once

#include "common.h"

namespace {

constexpr int64_t RUNS = 8;             // in a tile: 8 sums, the tap and 1 factor leave room in 16 registers
constexpr int64_t TAPS = 9;             // of a gradient at a time: 9 sums, the gradient and 1 factor
constexpr int64_t CHANNELS = 64;        // whose kernels are mixed at a time
constexpr int64_t AHEAD = 512;          // floats of a map that are prefetched before they are copied
constexpr int64_t MIN_WORK = 16 << 10;  // vectors times taps for a thread

// A map [H, W] with padding. Column c is element c / sections of section c % sections.
class PaddedMap {
 public:
  PaddedMap(int64_t H, int64_t W, PadAmounts m, int64_t sections, int64_t rows, int64_t pitch)
      : height_(std::min(H, rows - m.top)),
        width_(W),
        pads_(m),
        sections_(sections),
        pitch_(std::max(pitch, (m.left + W + sections - 1) / sections)),
        section_(rows * pitch_ + LANES) {  // the last row is copied by whole vectors too
    data_.resize(sections * section_ + LANES);
    const int64_t rest = W % (sections == 2 ? 2 * LANES : LANES);
    rest_[0] = mask_of(rest), rest_[1] = mask_of(rest - LANES);
    first_ = at(m.top, m.left), second_ = at(m.top, m.left + 1);
  }

  int64_t at(int64_t row, int64_t column) const {
    return column % sections_ * section_ + row * pitch_ + column / sections_;
  }
  const float* data() const { return data_.data(); }

  // The padding is zero from the start, and stays.
  void fill(const float* from) {
    float *even = data_.data() + first_, *odd = data_.data() + second_;
    if (sections_ == 1)
      for (int64_t h = 0; h < height_; h++, from += width_, even += pitch_) copy(from, even);
    else if (sections_ == 2)
      for (int64_t h = 0; h < height_; h++, from += width_, even += pitch_, odd += pitch_) part(from, even, odd);
    else
      for (int64_t h = 0; h < height_; h++, from += width_)
        for (int64_t w = 0; w < width_; w++) data_[at(pads_.top + h, pads_.left + w)] = from[w];
  }

 private:
  // Both write zeros after the last element: into the padding, or where the next row is copied later.
  void copy(const float* from, float* to) const {
    int64_t w = 0;
    __builtin_prefetch(from + AHEAD);
    for (; w + LANES <= width_; w += LANES) store(to + w, load(from + w));
    if (w < width_) store(to + w, load_some(from + w, rest_[0]));
  }

  void part(const float* from, float* even, float* odd) const {
    int64_t w = 0;
    auto put = [&](Vec a, Vec b) {
      store(even + w / 2, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
      store(odd + w / 2, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
    };
    for (; w + 2 * LANES <= width_; w += 2 * LANES) put(load(from + w), load(from + w + LANES));
    if (w < width_) put(load_some(from + w, rest_[0]), load_some(from + w + LANES, rest_[1]));
  }

  int64_t height_, width_;
  PadAmounts pads_;
  int64_t sections_, pitch_, section_;
  int64_t first_, second_;  // offsets of the first two columns of the first row: with a stride of 2, in two sections
  std::vector<float> data_;
  Mask rest_[2];
};

// Taps and their positions: all of a convolution; of its transpose those of one phase of the stride.
struct Window {
  Sizes taps, offsets;       // offsets: of a tap in the padded map, from where a position starts
  Sizes starts, to, count;   // of runs of up to eight positions: in the padded map, in the result, how many
  int64_t step = 1;          // in the result, from one position to the next
  bool whole = false;        // all taps in their order
  bool overwritten = false;  // what a run writes past its end, the next run overwrites

  void add_row(int64_t start, int64_t first, int64_t positions) {
    for (int64_t w = 0; w < positions; w += LANES) {
      starts.push_back(start + w), to.push_back(first + w * step), count.push_back(std::min(LANES, positions - w));
    }
  }
};

// sums[j] = sum_t kernel[t] * base[starts[j] + offsets[t]], for eight positions from each start.
template <int N>
void slide(const float* base, const int64_t* starts, const Sizes& offsets, const float* kernel, Vec* sums) {
  Vec c[N] = {};
  const float* r[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) r[j] = base + starts[j];
  for (size_t t = 0; t < offsets.size(); t++) {
    const Vec k = Vec{} + kernel[t];
    const int64_t o = offsets[t];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) c[j] += k * load(r[j] + o);
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) sums[j] = c[j];
}

constexpr decltype(&slide<1>) SLIDES[RUNS] = {slide<1>, slide<2>, slide<3>, slide<4>,
                                              slide<5>, slide<6>, slide<7>, slide<8>};  // by runs

void slide_over(const Window& window, const float* base, const float* kernel, float* y, int64_t size) {
  const int64_t runs = window.starts.size();
  Vec sums[RUNS];
  for (int64_t r = 0; r < runs; r += RUNS) {
    const int64_t some = std::min(RUNS, runs - r);
    SLIDES[some - 1](base, window.starts.data() + r, window.offsets, kernel, sums);
    for (int64_t j = 0; j < some; j++) {
      const int64_t to = window.to[r + j], count = window.count[r + j];
      if (window.step == 1 && (count == LANES || (window.overwritten && to + LANES <= size)))
        store(y + to, sums[j]);
      else
        for (int64_t p = 0; p < count; p++) y[to + p * window.step] = sums[j][p];
    }
  }
}

// K[b,c] of one sample and channel after the other, mixed for some channels at a time.
class Kernels {
 public:
  Kernels(const Weights& experts, const Gates& gates)
      : weight_(experts),
        gates_(gates),
        experts_(experts.size(0)),
        channels_(experts.size(1)),
        taps_(experts.size(3) * experts.size(4)),
        data_(std::min(channels_, CHANNELS) * taps_),
        ones_(std::max(taps_, CHANNELS), 1.f) {}

  const float* of(int64_t b, int64_t c) {
    if (b != sample_ || c / CHANNELS != block_) mix(sample_ = b, block_ = c / CHANNELS);
    return data_.data() + (c - block_ * CHANNELS) * taps_;
  }

 private:
  void mix(int64_t b, int64_t block) {
    const int64_t first = block * CHANNELS, channels = std::min(CHANNELS, channels_ - first), size = channels * taps_;
    float* __restrict to = data_.data();
    for (int64_t e = 0; e < experts_; e++) {
      const float g = gates_.gate ? gates_.gate[b * experts_ + e] : 1.f;
      const int64_t start = e * channels_ + first;
      typed(weight_.element, weight_.data, [&](auto* weight) {
        const auto* from = weight + start * taps_;
        if (weight_.scale) {
          if (e == 0) std::fill_n(to, size, 0.f);
          for (int64_t c = 0; c < channels; c++)
            for (int64_t t = c * taps_; t < (c + 1) * taps_; t++)
              to[t] += g * weight_.scale[start + c] * as_float(from[t]);
        } else if (e == 0) {
          for (int64_t i = 0; i < size; i++) to[i] = g * as_float(from[i]);
        } else {
          for (int64_t i = 0; i < size; i++) to[i] += g * as_float(from[i]);
        }
      });
    }
    if (gates_.before || gates_.after || gates_.spatial) scale(b, first, channels);
  }

  void scale(int64_t b, int64_t first, int64_t channels) {
    const float *before = gates_.before ? gates_.before + b * channels_ + first : ones_.data(),
                *after = gates_.after ? gates_.after + b * channels_ + first : ones_.data(),
                *spatial = gates_.spatial ? gates_.spatial + b * taps_ : ones_.data();
    float* __restrict to = data_.data();
    for (int64_t c = 0; c < channels; c++, to += taps_) {
      const float of_channel = before[c] * after[c];
      for (int64_t t = 0; t < taps_; t++) to[t] *= of_channel * spatial[t];
    }
  }

  Weights weight_;
  Gates gates_;
  int64_t experts_, channels_, taps_, sample_ = -1, block_ = -1;
  std::vector<float> data_, ones_;
};

// For every map [H, W] of x [B, C, H, W]: each thread copies ``padded`` and makes one ``of_map``, which is called with
// the padded map, the sample and the channel.
template <typename Make>
void for_each_map(const View& x, const PaddedMap& padded, int64_t work, const Make& make) {
  const int64_t C = x.size(1), area = x.size(2) * x.size(3);
  const float* from = x.data;
  parallel_for(0, x.size(0) * C, 1 + MIN_WORK / (1 + work), [&](int64_t begin, int64_t end) {
    PaddedMap map = padded;
    auto of_map = make();
    for (int64_t m = begin, b = begin / C, c = begin % C; m < end; m++) {  // counted up: a division is slow
      map.fill(from + m * area);
      of_map(map, b, c);
      if (++c == C) c = 0, b++;
    }
  });
}

int64_t work_of(const std::vector<Window>& windows) {
  int64_t work = 0;
  for (const Window& window : windows) work += window.starts.size() * window.taps.size();
  return work;
}

// Computes all windows over each map of x, into a map of ``size`` positions of y.
void slide_all(const View& x, const Weights& experts, const Gates& gates, const std::vector<Window>& windows,
               const PaddedMap& padded, int64_t size, float* y) {
  const int64_t C = x.size(1);
  for_each_map(x, padded, work_of(windows), [&] {
    return [&, kernels = Kernels(experts, gates), some = std::vector<float>(experts.size(3) * experts.size(4))](
               const PaddedMap& map, int64_t b, int64_t c) mutable {
      const float* kernel = kernels.of(b, c);
      for (const Window& window : windows) {
        if (!window.whole)
          for (size_t t = 0; t < window.taps.size(); t++) some[t] = kernel[window.taps[t]];
        slide_over(window, map.data(), window.whole ? kernel : some.data(), y + (b * C + c) * size, size);
      }
    };
  });
}

// A forward pass: the padded map that it reads, and its one window.
struct Forward {
  PaddedMap map;
  Window window;

  Forward(const View& x, const Geometry& g, int64_t height, int64_t width)
      : map(x.size(2), x.size(3), {g.ph, 0, g.pw, 0}, g.sw, (height - 1) * g.sh + (g.kh - 1) * g.dh + 1,
            (g.kw - 1) * g.dw / g.sw + 1 + (width + LANES - 1) / LANES * LANES) {
    for (int64_t i = 0; i < g.kh; i++)
      for (int64_t j = 0; j < g.kw; j++) {
        window.taps.push_back(i * g.kw + j);
        window.offsets.push_back(map.at(i * g.dh, j * g.dw));
      }
    for (int64_t h = 0; h < height; h++) window.add_row(map.at(h * g.sh, 0), h * width, width);
    window.whole = window.overwritten = true;
  }
};

void depthwise_convolve(const View& x, const Weights& experts, const Gates& gates, const Geometry& g, float* y) {
  const int64_t height = g.outputs(x.size(2), true), width = g.outputs(x.size(3), false);
  const Forward forward(x, g, height, width);
  in_large_pages(y, x.size(0) * x.size(1) * height * width);
  slide_all(x, experts, gates, {forward.window}, forward.map, height * width, y);
}

// The gradient of the input [B, C, H, W] from that of the output.
void depthwise_input_gradient(const View& grad, const View& x, const View& experts, const Gates& gates,
                              const Geometry& g, float* to_x) {
  const int64_t height = x.size(2), width = x.size(3);
  const Steps tall(g.kh, g.sh, g.ph, g.dh, height, grad.size(2)), wide(g.kw, g.sw, g.pw, g.dw, width, grad.size(3));
  const PadAmounts pads{tall.before, tall.after, wide.before, wide.after};
  const PaddedMap map(grad.size(2), grad.size(3), pads, 1, tall.before + grad.size(2) + tall.after,
                      wide.before + grad.size(3) + wide.after + LANES);
  std::vector<Window> windows;
  const int64_t written = for_each_phase(tall, wide, [&](const Step& t, const Step& w) {
    Window window;
    window.step = g.sw;
    window.overwritten = g.sh == 1;
    for (size_t i = 0; i < t.taps.size(); i++)
      for (size_t j = 0; j < w.taps.size(); j++) {
        window.taps.push_back(t.taps[i] * g.kw + w.taps[j]);
        window.offsets.push_back(map.at(t.reach[i], w.reach[j]));
      }
    for (size_t i = 0; i < t.pixels.size(); i++)
      window.add_row(map.at(t.starts[i], w.starts[0]), t.pixels[i] * width + w.pixels[0], w.pixels.size());
    windows.push_back(window);
  });
  const int64_t count = x.size(0) * x.size(1) * height * width;
  in_large_pages(to_x, count);
  if (written < height * width) std::fill_n(to_x, count, 0.f);
  slide_all(grad, experts, gates, windows, map, height * width, to_x);
}

// to[t] = sum over runs of side * base[starts + offsets[t]]. Nothing is read past the end of a row: zero times NaN is
// NaN.
template <int N>
void dot(const float* base, const Window& window, const int64_t* offsets, const float* side, float* to) {
  Vec c[N] = {};
  for (size_t r = 0; r < window.starts.size(); r++) {
    const Vec s = load(side + r * LANES);
    const float* at = base + window.starts[r];
    if (window.count[r] == LANES) {
#pragma GCC unroll 9
      for (int t = 0; t < N; t++) c[t] += s * load(at + offsets[t]);
    } else {
      const Mask some = mask_of(window.count[r]);
#pragma GCC unroll 9
      for (int t = 0; t < N; t++) c[t] += s * load_some(at + offsets[t], some);
    }
  }
#pragma GCC unroll 9
  for (int t = 0; t < N; t++) to[t] = sum_of(c[t]);
}

constexpr decltype(&dot<1>) DOTS[TAPS] = {dot<1>, dot<2>, dot<3>, dot<4>, dot<5>,
                                          dot<6>, dot<7>, dot<8>, dot<9>};  // by taps

// The gradient of each sample's kernel, [B, C, 1, kh, kw], from that of the output.
void depthwise_kernel_gradient(const View& grad, const View& x, const Geometry& g, float* to) {
  const int64_t C = x.size(1), area = grad.size(2) * grad.size(3);
  const Forward forward(x, g, grad.size(2), grad.size(3));
  const Window& window = forward.window;
  const int64_t taps = window.taps.size(), runs = window.starts.size();
  const float* from = grad.data;
  for_each_map(x, forward.map, taps * runs, [&] {
    return [&, side = std::vector<float>(runs * LANES)](const PaddedMap& map, int64_t b, int64_t c) mutable {
      for (int64_t r = 0; r < runs; r++)  // zeros past the end of a row stay
        std::copy_n(from + (b * C + c) * area + window.to[r], window.count[r], side.data() + r * LANES);
      for (int64_t t = 0; t < taps; t += TAPS)
        DOTS[std::min(TAPS, taps - t) - 1](map.data(), window, window.offsets.data() + t, side.data(),
                                           to + (b * C + c) * taps + t);
    };
  });
}

}  // namespace
