// The routers: pooling, and the small maps from pooled features to a mixture.

#pragma once

#include "common.h"

namespace {

constexpr int64_t MIN_ELEMENTS_PER_THREAD = 32 << 10;

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

// The mean over positions: [B, I, H, W] -> [B, I].
void pool(const View& x, float* pooled) {
  const int64_t area = x.size(2) * x.size(3);
  parallel_for(0, x.size(0) * x.size(1), 1 + MIN_ELEMENTS_PER_THREAD / (1 + area), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) pooled[m] = sum_of(x.data + m * area, area) / area;
  });
}

// to[b, o] = f(x_b . weight_o + bias_o, o).
template <typename Function>
void apply(const condconv::Linear& map, const float* x, int64_t batch, float* to, const Function& f) {
  const int64_t grain = 1 + MIN_ELEMENTS_PER_THREAD / (1 + map.inputs);
  parallel_for(0, batch * map.outputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t o = i % map.outputs;
      const float z = dot(x + i / map.outputs * map.inputs, map.weight + o * map.inputs, map.inputs);
      to[i] = f(z + (map.bias ? map.bias[o] : 0.f), o);
    }
  });
}

float sigmoid(float z) { return 1.f / (1.f + std::exp(-z)); }

// factor * sigmoid(pooled . weight + bias): [B, I] -> [B, E].
void sigmoid_gates(const float* pooled, int64_t batch, const condconv::Linear& linear, float factor, float* gates) {
  apply(linear, pooled, batch, gates, [&](float z, int64_t) { return factor * sigmoid(z); });
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

// h = relu(norm(reduce(pooled)));  2 sigmoid(head(h) / T) for each of the first heads, softmax(head(h) / T) for the
// last: [B, out] each, null where a head is absent.
void attention(const float* pooled, int64_t batch, const condconv::Attention& form, float* const* outputs) {
  const condconv::BatchNorm& norm = form.norm;
  std::vector<float> hidden(batch * form.reduce.outputs);
  apply(form.reduce, pooled, batch, hidden.data(), [&](float h, int64_t c) {
    if (norm.mean) {
      const float scale = norm.weight[c] / std::sqrt(norm.variance[c] + (float)norm.eps);
      h = h * scale + (norm.bias[c] - norm.mean[c] * scale);
    }
    return form.relu && h < 0.f ? 0.f : h;  // NaN stays NaN
  });
  for (int i = 0; i < form.count; i++) {
    const condconv::Linear& head = form.heads[i];
    if (!head.weight) continue;
    const bool last = i + 1 == form.count;
    const float t = form.temperature;
    apply(head, hidden.data(), batch, outputs[i],
          [&](float z, int64_t) { return last ? z / t : 2.f * sigmoid(z / t); });
    if (last) softmax(outputs[i], batch, head.outputs);
  }
}

}  // namespace
