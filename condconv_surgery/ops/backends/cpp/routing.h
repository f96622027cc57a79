// The routers: pooling, and the small maps from pooled features to a mixture, each in one call. They return nothing for
// tensors that are not contiguous, in float32, on the CPU and of matching sizes, and for large ones: torch's operators
// then compute them or raise.

#pragma once

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t MIN_ELEMENTS_PER_THREAD = 32 << 10;
// Outputs of an attention, one dot product each; for more, torch's matrix products are faster. 32 samples of 1152
// channels with ODConv's four heads took 498 us here and 211 us by torch; one of them 42 and 99.
constexpr int64_t MAX_OUTPUTS = 8 << 10;

float sum_of(const float* from, int64_t count) {
  Vec c[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) c[j] += load(from + i + j * LANES);
  for (; i + LANES <= count; i += LANES) c[0] += load(from + i);
  float rest = 0.f;
  for (; i < count; i++) rest += from[i];
  return sum_of((c[0] + c[1]) + (c[2] + c[3])) + rest;
}

float dot(const float* a, const float* b, int64_t count) {
  Vec c[2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    c[0] += load(a + i) * load(b + i);
    c[1] += load(a + i + LANES) * load(b + i + LANES);
  }
  float rest = 0.f;
  for (; i < count; i++) rest += a[i] * b[i];
  return sum_of(c[0] + c[1]) + rest;
}

bool is_ready(const Tensor& t, at::IntArrayRef sizes) {
  return t.device().is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.sizes() == sizes;
}

bool is_ready(const Maybe& t, at::IntArrayRef sizes) { return !t || is_ready(*t, sizes); }

// The mean over positions: [B, I, H, W] -> [B, I].
Maybe pool(const Tensor& x) {
  if (x.dim() != 4 || x.size(2) * x.size(3) == 0 || !is_ready(x, x.sizes())) return {};
  const int64_t area = x.size(2) * x.size(3);
  Tensor pooled = at::empty({x.size(0), x.size(1)}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = pooled.mutable_data_ptr<float>();
  at::parallel_for(0, pooled.numel(), 1 + MIN_ELEMENTS_PER_THREAD / (1 + area), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) to[m] = sum_of(from + m * area, area) / area;
  });
  return pooled;
}

// A linear map followed by an elementwise function: to[b, o] = f(x_b . weight_o + bias_o, o).
struct Linear {
  const float *weight, *bias;
  int64_t inputs, outputs;

  Linear(const Tensor& w, const Maybe& b)
      : weight(w.const_data_ptr<float>()), bias(data_of(b)), inputs(w.size(1)), outputs(w.size(0)) {}
  static bool supports(const Tensor& w, const Maybe& b, int64_t inputs) {
    return w.dim() == 2 && is_ready(w, {w.size(0), inputs}) && is_ready(b, {w.size(0)});
  }

  template <typename Function>
  void apply(const float* x, int64_t batch, float* to, const Function& f) const {
    at::parallel_for(0, batch * outputs, 1 + MIN_ELEMENTS_PER_THREAD / (1 + inputs), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t o = i % outputs;
        to[i] = f(dot(x + i / outputs * inputs, weight + o * inputs, inputs) + (bias ? bias[o] : 0.f), o);
      }
    });
  }
};

float sigmoid(float z) { return 1.f / (1.f + std::exp(-z)); }

// factor * sigmoid(pooled . weight + bias): [B, I] -> [B, E].
Maybe sigmoid_gates(const Tensor& pooled, const Tensor& weight, const Maybe& bias, double factor) {
  if (pooled.dim() != 2 || !is_ready(pooled, pooled.sizes())) return {};
  if (!Linear::supports(weight, bias, pooled.size(1))) return {};
  const Linear linear(weight, bias);
  const int64_t B = pooled.size(0);
  Tensor gates = at::empty({B, linear.outputs}, pooled.options());
  const float by = factor;
  linear.apply(pooled.const_data_ptr<float>(), B, gates.mutable_data_ptr<float>(),
               [&](float z, int64_t) { return by * sigmoid(z); });
  return gates;
}

// In place: softmax of each row of [B, count].
void softmax(float* rows, int64_t batch, int64_t count) {
  for (int64_t b = 0; b < batch; b++, rows += count) {
    const float most = *std::max_element(rows, rows + count);
    float total = 0.f;
    for (int64_t i = 0; i < count; i++) total += rows[i] = std::exp(rows[i] - most);
    for (int64_t i = 0; i < count; i++) rows[i] /= total;
  }
}

using MaybeMap = std::optional<std::pair<Tensor, Maybe>>;  // weight [out, hidden], bias [out]

// Batch norm by running statistics, h * scale + shift for each channel; without parts scale is 1 and shift 0.
struct Norm {
  std::vector<float> scale, shift;

  Norm(const std::vector<Tensor>& parts, double eps, int64_t channels) : scale(channels, 1.f), shift(channels, 0.f) {
    if (parts.empty()) return;
    const float *mean = parts[0].const_data_ptr<float>(), *variance = parts[1].const_data_ptr<float>();
    const float *weight = parts[2].const_data_ptr<float>(), *bias = parts[3].const_data_ptr<float>();
    for (int64_t c = 0; c < channels; c++) {
      scale[c] = weight[c] / std::sqrt(variance[c] + (float)eps);
      shift[c] = bias[c] - mean[c] * scale[c];
    }
  }
};

// h = relu(norm(reduce(pooled)));  2 sigmoid(head(h) / T) for each of the first heads, softmax(head(h) / T) for the
// last. Returns one tensor [B, out] for each head, an undefined one where it is absent. norm: mean, variance, weight
// and bias, or empty.
std::optional<std::vector<Tensor>> attention(const Tensor& pooled, const Tensor& reduce_weight,
                                             const Maybe& reduce_bias, const std::vector<Tensor>& norm, double eps,
                                             bool relu, const std::vector<MaybeMap>& heads, const Tensor& temperature) {
  if (pooled.dim() != 2 || !is_ready(pooled, pooled.sizes()) || !is_ready(temperature, {})) return {};
  if (!Linear::supports(reduce_weight, reduce_bias, pooled.size(1))) return {};
  const Linear reduce(reduce_weight, reduce_bias);
  const int64_t B = pooled.size(0), width = reduce.outputs;
  for (const Tensor& part : norm)
    if (norm.size() != 4 || !is_ready(part, {width})) return {};
  int64_t columns = width;
  for (const MaybeMap& head : heads) {
    if (head && !Linear::supports(head->first, head->second, width)) return {};
    if (head) columns += head->first.size(0);
  }
  if (B * columns > MAX_OUTPUTS) return {};
  const Norm normed(norm, eps, width);
  std::vector<float> hidden(B * width);
  reduce.apply(pooled.const_data_ptr<float>(), B, hidden.data(), [&](float h, int64_t o) {
    h = h * normed.scale[o] + normed.shift[o];
    return relu && h < 0.f ? 0.f : h;  // NaN stays NaN
  });
  const float t = *temperature.const_data_ptr<float>();
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < heads.size(); i++) {
    outputs.emplace_back();
    if (!heads[i]) continue;
    const bool last = i + 1 == heads.size();
    const Linear head(heads[i]->first, heads[i]->second);
    outputs[i] = at::empty({B, head.outputs}, pooled.options());
    float* to = outputs[i].mutable_data_ptr<float>();
    head.apply(hidden.data(), B, to, [&](float z, int64_t) { return last ? z / t : 2.f * sigmoid(z / t); });
    if (last) softmax(to, B, head.outputs);
  }
  return outputs;
}

}  // namespace
