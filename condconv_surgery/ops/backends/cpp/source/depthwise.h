// A depthwise convolution whose kernel is mixed anew for each sample, and its gradients, on a CPU in float32:
//
//     y[b,c] = conv(x[b,c], K[b,c]),    K[b,c] = after[b,c] * before[b,c] * spatial_b * sum_e gate[b,e] * experts[e,c]
//
// One map at a time: it is copied with zero padding into the second level of cache, where the window slides over it
// (sliding.h). With a stride the map is copied such that neighbouring positions are contiguous too. A 1x1 kernel only
// scales its map.

#pragma once

#include "sliding.h"

namespace {

constexpr int64_t CHANNELS = 64;        // whose kernels are mixed at a time
constexpr int64_t MIN_WORK = 16 << 10;  // vectors times taps for a thread

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
  for (const Window& window : windows) work += window.runs() * window.taps;
  return work;
}

// Computes all windows over each map of x, into a map of ``size`` positions of y.
void slide_all(const View& x, const Weights& experts, const Gates& gates, const std::vector<Window>& windows,
               const PaddedMap& padded, int64_t size, float* y) {
  const int64_t C = x.size(1);
  for_each_map(x, padded, work_of(windows), [&] {
    return [&, kernels = Kernels(experts, gates)](const PaddedMap& map, int64_t b, int64_t c) mutable {
      const float* kernel = kernels.of(b, c);
      for (const Window& window : windows)
        with_vectors(window, [&]<typename V>(V) {
          slide_over<V>(window, map.data(), kernel, y + (b * C + c) * size, size);
        });
    };
  });
}

// y[b,c] = K[b,c] x[b,c], of a kernel with one tap.
void scale_maps(const View& x, const Weights& experts, const Gates& gates, float* y) {
  const int64_t C = x.size(1), area = x.size(2) * x.size(3);
  parallel_for(0, x.size(0) * C, 1 + LANES * MIN_WORK / area, [&](int64_t begin, int64_t end) {
    Kernels kernels(experts, gates);
    for (int64_t m = begin; m < end; m++) {
      const float k = *kernels.of(m / C, m % C);
      const float* __restrict from = x.data + m * area;
      float* __restrict to = y + m * area;
      for (int64_t i = 0; i < area; i++) to[i] = k * from[i];
    }
  });
}

// to[b,c] = sum of grad[b,c] x[b,c]: the gradient of a kernel with one tap.
void sum_products(const View& grad, const View& x, float* to) {
  const int64_t area = x.size(2) * x.size(3);
  parallel_for(0, x.size(0) * x.size(1), 1 + LANES * MIN_WORK / area, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const float *a = grad.data + m * area, *b = x.data + m * area;
      Vec c[4] = {};
      int64_t i = 0;
      for (; i + 4 * LANES <= area; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) c[j] += load(a + i + j * LANES) * load(b + i + j * LANES);
      float sum = sum_of((c[0] + c[1]) + (c[2] + c[3]));
      for (; i < area; i++) sum += a[i] * b[i];
      to[m] = sum;
    }
  });
}

// A forward pass: the padded map that it reads, and its one window.
struct Forward {
  PaddedMap map;
  Window window;

  Forward(const View& x, const Geometry& g, int64_t height, int64_t width)
      : map(x.size(2), x.size(3), {g.ph, 0, g.pw, 0}, g.sw, (height - 1) * g.sh + (g.kh - 1) * g.dh + 1,
            (g.kw - 1) * g.dw / g.sw + 1 + (width + LANES - 1) / LANES * LANES) {
    std::vector<TapRow> rows;
    for (int64_t i = 0; i < g.kh; i++) rows.push_back({i * g.dh, i});
    for (int64_t j = 0; j < g.kw; j++) window.add_taps(rows, g.sh, g.kw, j, map.at(0, j * g.dw), map.at(1, 0));
    window.start = 0, window.pitch = map.at(g.sh, 0);
    window.first = 0, window.step = 1, window.row = width;
    window.height = height, window.width = width;
    window.overwritten = true;
  }
};

bool is_scale(const Geometry& g) { return g.kh * g.kw * g.sh * g.sw == 1 && g.ph + g.pw == 0; }

void depthwise_convolve(const View& x, const Weights& experts, const Gates& gates, const Geometry& g, float* y) {
  const int64_t height = g.outputs(x.size(2), true), width = g.outputs(x.size(3), false);
  in_large_pages(y, x.size(0) * x.size(1) * height * width);
  if (is_scale(g)) return scale_maps(x, experts, gates, y);
  const Forward forward(x, g, height, width);
  slide_all(x, experts, gates, {forward.window}, forward.map, height * width, y);
}

// The gradient of the input [B, C, H, W] from that of the output.
void depthwise_input_gradient(const View& grad, const View& x, const View& experts, const Gates& gates,
                              const Geometry& g, float* to_x) {
  const int64_t height = x.size(2), width = x.size(3), count = x.size(0) * x.size(1) * height * width;
  in_large_pages(to_x, count);
  if (is_scale(g)) return scale_maps(grad, experts, gates, to_x);
  const Steps tall(g.kh, g.sh, g.ph, g.dh, height, grad.size(2)), wide(g.kw, g.sw, g.pw, g.dw, width, grad.size(3));
  const PadAmounts pads{tall.before, tall.after, wide.before, wide.after};
  const PaddedMap map(grad.size(2), grad.size(3), pads, 1, tall.before + grad.size(2) + tall.after,
                      wide.before + grad.size(3) + wide.after + LANES);
  std::vector<Window> windows;
  const int64_t written = for_each_phase(tall, wide, [&](const Step& t, const Step& w) {
    Window window;
    std::vector<TapRow> rows;
    for (size_t i = 0; i < t.taps.size(); i++) rows.push_back({t.reach[i], t.taps[i]});
    for (size_t j = 0; j < w.taps.size(); j++)
      window.add_taps(rows, 1, g.kw, w.taps[j], map.at(0, w.reach[j]), map.at(1, 0));
    window.start = map.at(t.starts[0], w.starts[0]), window.pitch = map.at(1, 0);
    window.first = t.pixels[0] * width + w.pixels[0], window.step = g.sw, window.row = g.sh * width;
    window.height = t.pixels.size(), window.width = w.pixels.size();
    window.overwritten = g.sh == 1;
    windows.push_back(window);
  });
  if (written < height * width) std::fill_n(to_x, count, 0.f);
  slide_all(grad, experts, gates, windows, map, height * width, to_x);
}

// The gradient of each sample's kernel, [B, C, 1, kh, kw], from that of the output.
void depthwise_kernel_gradient(const View& grad, const View& x, const Geometry& g, float* to) {
  const int64_t C = x.size(1), area = grad.size(2) * grad.size(3);
  if (is_scale(g)) return sum_products(grad, x, to);
  const Forward forward(x, g, grad.size(2), grad.size(3));
  const Window& window = forward.window;
  for_each_map(x, forward.map, work_of({window}), [&] {
    return [&, products = Buffer(window.taps * WIDEST)](const PaddedMap& map, int64_t b, int64_t c) mutable {
      const int64_t m = b * C + c;
      with_vectors(window, [&]<typename V>(V) {
        correlate_over<V>(window, map.data(), grad.data + m * area, products.data(), to + m * window.taps);
      });
    };
  });
}

}  // namespace
