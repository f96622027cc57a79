// The operators of convolutions: checks, outputs, and the kernels of the chosen instructions.

#pragma once

#include "tensors.h"

namespace {

using condconv::Gates;

const condconv::Kernels* used = nullptr;

const condconv::Kernels& kernels() {
  STD_TORCH_CHECK(used, "the compiled kernels are not enabled: condconv_surgery.native.enable()");
  return *used;
}

struct Mixture {
  const Maybe &gate, &spatial, &in_scale, &out_scale;
  Gates gates() const { return {data_of(gate), data_of(spatial), data_of(in_scale), data_of(out_scale)}; }
};

// Everything that the loops of the kernels rely on, but for the experts' dtype.
void check_geometry(const Tensor& x, const Tensor& experts, const Geometry& g, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && experts.dim() == 5 && experts.numel() > 0,
                  "nothing to convolve: x has the sizes ", text(x.sizes()), ", the experts have ",
                  text(experts.sizes()));
  STD_TORCH_CHECK(g.kh == experts.size(3) && g.kw == experts.size(4), "the experts have the sizes ",
                  text(experts.sizes()));
  const int64_t E = experts.size(0), O = experts.size(1), I = x.size(1);
  STD_TORCH_CHECK(g.sh > 0 && g.sw > 0 && g.dh > 0 && g.dw > 0 && g.ph >= 0 && g.pw >= 0, "a stride or dilation below ",
                  "1, or a padding below 0");
  STD_TORCH_CHECK(groups > 0 && I % groups == 0 && O % groups == 0, groups, " groups of ", I, " channels and ", O,
                  " filters");
  require(x, x.sizes(), "x");
  const Sizes sizes{E, O, I / groups, g.kh, g.kw};
  STD_TORCH_CHECK(has_sizes(experts, sizes), "the experts have the sizes ", text(experts.sizes()), ", they must have ",
                  text(sizes));
  STD_TORCH_CHECK(x.size(2) + 2 * g.ph > g.dh * (g.kh - 1) && x.size(3) + 2 * g.pw > g.dw * (g.kw - 1),
                  "Kernel size can't be greater than actual input size: x has the sizes ", text(x.sizes()),
                  ", the experts ", text(experts.sizes()));
}

Geometry checked_geometry(const Tensor& x, const Tensor& experts, const Sizes& stride, const Sizes& padding,
                          const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 && experts.dim() == 5,
                  "stride, padding and dilation have two values each, the experts five dimensions");
  const Geometry g{experts.size(3), experts.size(4), stride[0],   stride[1],
                   padding[0],      padding[1],      dilation[0], dilation[1]};
  check_geometry(x, experts, g, groups);
  return g;
}

void check_mixture(const Tensor& x, const Tensor& experts, const Mixture& mixture) {
  const int64_t B = x.size(0), E = experts.size(0);
  if (mixture.gate)
    require(*mixture.gate, {B, E}, "the gate");
  else
    STD_TORCH_CHECK(E == 1, E, " experts need a gate");
  if (mixture.spatial) require(*mixture.spatial, {B, experts.size(3), experts.size(4)}, "the spatial part");
  if (mixture.in_scale) require(*mixture.in_scale, {B, x.size(1)}, "the scale of the input");
  if (mixture.out_scale) require(*mixture.out_scale, {B, experts.size(1)}, "the scale of the output");
}

bool is_depthwise(const Tensor& x, const Tensor& experts, int64_t groups) {
  return groups > 1 && groups == x.size(1) && groups == experts.size(1);
}

Sizes output_sizes(const Tensor& x, const Tensor& experts, const Geometry& g) {
  return {x.size(0), experts.size(1), g.outputs(x.size(2), true), g.outputs(x.size(3), false)};
}

Tensor convolve_weights(const Tensor& x, const Tensor& experts, const Weights& weights, const Mixture& mixture,
                        const Geometry& g, int64_t groups) {
  check_mixture(x, experts, mixture);
  const Tensor y = empty(output_sizes(x, experts, g));
  const auto function = is_depthwise(x, experts, groups) ? kernels().depthwise_convolve : kernels().convolve;
  function(view_of(x), weights, mixture.gates(), g, data_to(y));
  return y;
}

Tensor convolve(const Tensor& x, const Tensor& experts, const Maybe& gate, const Maybe& spatial, const Maybe& in_scale,
                const Maybe& out_scale, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                int64_t groups) {
  const Geometry g = checked_geometry(x, experts, stride, padding, dilation, groups);
  require(experts, experts.sizes(), "experts");
  return convolve_weights(x, experts, view_of(experts), {gate, spatial, in_scale, out_scale}, g, groups);
}

Tensor convolve_rounded(const Tensor& x, const Tensor& experts, const Maybe& scales, const Maybe& gate,
                        const Maybe& spatial, const Maybe& in_scale, const Maybe& out_scale, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Geometry g = checked_geometry(x, experts, stride, padding, dilation, groups);
  STD_TORCH_CHECK(are_weights(experts, scales), "experts are contiguous and on the CPU, in int8 with scales of the sizes ",
                  text(Sizes{experts.size(0), experts.size(1)}), ", or in bfloat16 or float32 without");
  return convolve_weights(x, experts, weights_of(experts, scales), {gate, spatial, in_scale, out_scale}, g, groups);
}

// [B, I, H, W] from grad [B, O, H', W'].
Tensor input_gradient(const Tensor& grad, const Tensor& x, const Tensor& experts, const Maybe& gate,
                      const Maybe& spatial, const Maybe& in_scale, const Maybe& out_scale, const Sizes& stride,
                      const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Geometry g = checked_geometry(x, experts, stride, padding, dilation, groups);
  require(experts, experts.sizes(), "experts");
  const Mixture mixture{gate, spatial, in_scale, out_scale};
  check_mixture(x, experts, mixture);
  require(grad, output_sizes(x, experts, g), "the gradient");
  const Tensor to_x = empty({x.size(0), x.size(1), x.size(2), x.size(3)});
  const bool depthwise = is_depthwise(x, experts, groups);
  const auto function = depthwise ? kernels().depthwise_input_gradient : kernels().input_gradient;
  function(view_of(grad), view_of(x), view_of(experts), mixture.gates(), g, data_to(to_x));
  return to_x;
}

// Of a layer that is not depthwise: the gradients of the experts and of those parts of the mixture that are present, in
// their order.
std::vector<Tensor> kernel_gradients(const Tensor& grad, const Tensor& x, const Tensor& experts, const Maybe& gate,
                                     const Maybe& spatial, const Maybe& in_scale, const Maybe& out_scale,
                                     const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Geometry g = checked_geometry(x, experts, stride, padding, dilation, groups);
  require(experts, experts.sizes(), "experts");
  STD_TORCH_CHECK(!is_depthwise(x, experts, groups), "depthwise layers have an operator of their own");
  const Mixture mixture{gate, spatial, in_scale, out_scale};
  check_mixture(x, experts, mixture);
  require(grad, output_sizes(x, experts, g), "the gradient");
  std::vector<Tensor> found;
  auto like = [&](const Tensor& t) {
    found.push_back(empty(Sizes(t.sizes().begin(), t.sizes().end())));
    return data_to(found.back());
  };
  auto like_part = [&](const Maybe& t) { return t ? like(*t) : nullptr; };
  const condconv::PartGradients to{like(experts), like_part(gate), like_part(spatial), like_part(in_scale),
                                   like_part(out_scale)};
  kernels().kernel_gradients(view_of(grad), view_of(x), view_of(experts), mixture.gates(), g, to);
  return found;
}

// The gradient of each sample's kernel, [B, C, 1, kh, kw].
Tensor depthwise_kernel_gradient(const Tensor& grad, const Tensor& x, const Tensor& experts, const Sizes& stride,
                                 const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Geometry g = checked_geometry(x, experts, stride, padding, dilation, groups);
  require(experts, experts.sizes(), "experts");
  STD_TORCH_CHECK(is_depthwise(x, experts, groups), groups, " groups of ", x.size(1), " channels: not depthwise");
  require(grad, output_sizes(x, experts, g), "the gradient");
  const Tensor to_kernels = empty({x.size(0), x.size(1), 1, g.kh, g.kw});
  kernels().depthwise_kernel_gradient(view_of(grad), view_of(x), g, data_to(to_kernels));
  return to_kernels;
}

}  // namespace
