// The operators of routers, and of whole layers: route, mix, convolve. All return nothing for tensors that are not
// contiguous, in float32, on the CPU and of matching sizes, and for what is faster otherwise: torch's operators then
// compute them or raise.

#pragma once

#include "convolutions.h"

namespace {

// Outputs of an attention, one dot product each; for more, torch's matrix products are faster. 32 samples of 1152
// channels with ODConv's four heads took 498 us here and 211 us by torch; one of them 42 and 99.
constexpr int64_t MAX_OUTPUTS = 8 << 10;

bool is_poolable(const Tensor& x) { return x.dim() == 4 && is_float_on_cpu(x) && x.size(2) * x.size(3) > 0; }

bool is_matrix(const Tensor& t) { return t.dim() == 2 && is_float_on_cpu(t); }

bool is_map(const Tensor& weight, const Maybe& bias, int64_t inputs) {
  return is_matrix(weight) && weight.size(1) == inputs && is_ready(bias, {weight.size(0)});
}

condconv::Linear map_of(const Tensor& weight, const Maybe& bias) {
  return {data_of(weight), data_of(bias), weight.size(1), weight.size(0)};
}

// The mean over positions: [B, I, H, W] -> [B, I].
Maybe pool(const Tensor& x) {
  if (!is_poolable(x)) return {};
  const Tensor pooled = empty({x.size(0), x.size(1)});
  kernels().pool(view_of(x), data_to(pooled));
  return pooled;
}

// factor * sigmoid(pooled . weight + bias): [B, I] -> [B, E].
Maybe sigmoid_gates(const Tensor& pooled, const Tensor& weight, const Maybe& bias, double factor) {
  if (!is_matrix(pooled) || !is_map(weight, bias, pooled.size(1))) return {};
  const Tensor gates = empty({pooled.size(0), weight.size(0)});
  kernels().sigmoid_gates(data_of(pooled), pooled.size(0), map_of(weight, bias), factor, data_to(gates));
  return gates;
}

using Parts = std::vector<Tensor>;  // of maps: weight and bias of each

bool is_map(const Parts& parts, size_t first, int64_t inputs) {
  return is_matrix(parts[first]) && parts[first].size(1) == inputs &&
         is_ready(parts[first + 1], {parts[first].size(0)});
}

// reduce: the weight, and a bias if it has one. norm: nothing, or mean, variance, weight and bias. heads: weight and
// bias of each that is present: of in_scale, out_scale, spatial and gate, by the bits of ``present`` from the lowest.
struct AttentionParts {
  const Parts &reduce, &norm;
  double eps;
  bool relu;
  const Tensor& temperature;
  const Parts& heads;
  int64_t present;

  // Whether this is computed here for ``batch`` samples of ``inputs`` features.
  bool is_supported(int64_t batch, int64_t inputs) const {
    if (reduce.empty() || reduce.size() > 2 || !is_ready(temperature, {})) return false;
    if (!is_map(reduce[0], reduce_bias(), inputs)) return false;
    const int64_t width = reduce[0].size(0);
    if (!norm.empty() && norm.size() != 4) return false;
    for (const Tensor& part : norm)
      if (!is_ready(part, {width})) return false;
    int64_t columns = width, first = 0;
    for (int64_t bits = present; bits; bits >>= 1) {
      if (!(bits & 1)) continue;
      if ((size_t)first + 2 > heads.size() || !is_map(heads, first, width)) return false;
      columns += heads[first].size(0);
      first += 2;
    }
    return (size_t)first == heads.size() && present < 1 << condconv::MAX_HEADS && batch * columns <= MAX_OUTPUTS;
  }

  condconv::Attention form() const {
    condconv::Attention form{
        map_of(reduce[0], reduce_bias()), {}, relu, condconv::MAX_HEADS, {}, *data_of(temperature)};
    if (!norm.empty()) form.norm = {data_of(norm[0]), data_of(norm[1]), data_of(norm[2]), data_of(norm[3]), eps};
    for (int i = 0, first = 0; i < condconv::MAX_HEADS; i++)
      if (present >> i & 1) form.heads[i] = map_of(heads[first], heads[first + 1]), first += 2;
    return form;
  }

  Maybe reduce_bias() const { return reduce.size() == 2 ? Maybe(reduce[1]) : Maybe(); }
};

// One tensor [B, out] for each head that is present; no tensor at all where this is not supported.
Parts attention(const Tensor& pooled, const Parts& reduce, const Parts& norm, double eps, bool relu,
                const Tensor& temperature, const Parts& heads, int64_t present) {
  const AttentionParts parts{reduce, norm, eps, relu, temperature, heads, present};
  if (!is_matrix(pooled) || !parts.is_supported(pooled.size(0), pooled.size(1))) return {};
  const condconv::Attention form = parts.form();
  Parts found;
  float* outputs[condconv::MAX_HEADS] = {};
  for (int i = 0; i < condconv::MAX_HEADS; i++)
    if (form.heads[i].weight) {
      found.push_back(empty({pooled.size(0), form.heads[i].outputs}));
      outputs[i] = data_to(found.back());
    }
  kernels().attention(data_of(pooled), pooled.size(0), form, outputs);
  return found;
}

// y += sum_e gate[b,e] bias[e], or bias[0] without a gate.
void add_bias(const Tensor& y, const float* gate, const Tensor& bias) {
  const int64_t E = bias.size(0), O = bias.size(1), positions = y.size(2) * y.size(3);
  const float* from = data_of(bias);
  float* to = data_to(y);
  torch::stable::parallel_for(0, y.size(0) * O, 1 + (32 << 10) / positions, [&](int64_t begin, int64_t end) {
    for (int64_t map = begin; map < end; map++) {
      const int64_t b = map / O, o = map % O;
      float sum = gate ? 0.f : from[o];
      for (int64_t e = 0; gate && e < E; e++) sum += gate[b * E + e] * from[e * O + o];
      for (int64_t p = 0; p < positions; p++) to[map * positions + p] += sum;
    }
  });
}

// A layer whose input can be pooled, after ``check_geometry``: the rest of route, mix, convolve, add the bias.
Tensor convolve_routed(const Tensor& x, const Tensor& experts, const Maybe& scales, const Maybe& bias,
                       const Gates& gates, const Geometry& g, int64_t groups) {
  const Tensor y = empty(output_sizes(x, experts, g));
  const auto function = is_depthwise(x, experts, groups) ? kernels().depthwise_convolve : kernels().convolve;
  function(view_of(x), weights_of(experts, scales), gates, g, data_to(y));
  if (bias) add_bias(y, gates.gate, *bias);
  return y;
}

bool is_layer(const Tensor& x, const Tensor& experts, const Maybe& scales, const Maybe& bias) {
  return is_poolable(x) && x.numel() > 0 && are_weights(experts, scales) &&
         is_ready(bias, {experts.size(0), experts.size(1)});
}

// A whole layer of CondConv. The geometry is given by single values: lists take as long as a small layer.
Maybe sigmoid_layer(const Tensor& x, const Tensor& experts, const Maybe& scales, const Maybe& bias,
                    const Tensor& weight, const Maybe& router_bias, double factor, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh,
                    int64_t dw, int64_t groups) {
  if (!is_layer(x, experts, scales, bias) || !is_map(weight, router_bias, x.size(1))) return {};
  if (weight.size(0) != experts.size(0)) return {};
  const Geometry g{experts.size(3), experts.size(4), sh, sw, ph, pw, dh, dw};
  check_geometry(x, experts, g, groups);
  const int64_t B = x.size(0), I = x.size(1);
  std::vector<float> routed(B * (I + experts.size(0)));
  float *pooled = routed.data(), *gate = pooled + B * I;
  kernels().pool(view_of(x), pooled);
  kernels().sigmoid_gates(pooled, B, map_of(weight, router_bias), factor, gate);
  return convolve_routed(x, experts, scales, bias, {gate, nullptr, nullptr, nullptr}, g, groups);
}

// A whole layer of ODConv or DynamicConv. gates: in place of the last head, a map as in ``sigmoid_layer``.
Maybe attention_layer(const Tensor& x, const Tensor& experts, const Maybe& scales, const Maybe& bias,
                      const Parts& reduce, const Parts& norm, double eps, bool relu, const Tensor& temperature, const Parts& heads, int64_t present,
                      const Maybe& gates, const Maybe& gates_bias, double factor, int64_t sh, int64_t sw, int64_t ph,
                      int64_t pw, int64_t dh, int64_t dw, int64_t groups) {
  const AttentionParts parts{reduce, norm, eps, relu, temperature, heads, present};
  if (!is_layer(x, experts, scales, bias) || !parts.is_supported(x.size(0), x.size(1))) return {};
  const Geometry g{experts.size(3), experts.size(4), sh, sw, ph, pw, dh, dw};
  check_geometry(x, experts, g, groups);
  const int64_t B = x.size(0), I = x.size(1), E = experts.size(0);
  const int64_t widths[] = {I, experts.size(1), g.kh * g.kw, E};
  const condconv::Attention form = parts.form();
  if (!form.heads[3].weight && !gates && E > 1) return {};
  if (gates && (form.heads[3].weight || !is_map(*gates, gates_bias, I) || gates->size(0) != E)) return {};
  int64_t columns = gates ? I + E : I;
  for (int i = 0; i < condconv::MAX_HEADS; i++) {
    if (form.heads[i].weight && form.heads[i].outputs != widths[i]) return {};
    columns += form.heads[i].outputs;
  }
  std::vector<float> routed(B * columns);
  float *pooled = routed.data(), *next = pooled + B * I, *outputs[condconv::MAX_HEADS] = {};
  for (int i = 0; i < condconv::MAX_HEADS; i++)
    if (form.heads[i].weight) outputs[i] = next, next += B * form.heads[i].outputs;
  kernels().pool(view_of(x), pooled);
  kernels().attention(pooled, B, form, outputs);
  if (gates) kernels().sigmoid_gates(pooled, B, map_of(*gates, gates_bias), factor, outputs[3] = next);
  return convolve_routed(x, experts, scales, bias, {outputs[3], outputs[2], outputs[0], outputs[1]}, g, groups);
}

}  // namespace
