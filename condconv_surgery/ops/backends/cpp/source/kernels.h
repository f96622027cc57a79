// What the operators know of the kernels, which are compiled once for each set of instructions. No torch: memory is
// given and taken as pointers to contiguous float32 values, already checked; experts of a forward may be rounded.
//
// B batch, E experts, I/O channels in/out, G groups, kh kw kernel, H W positions. All tensors are contiguous.

#pragma once

#include <cstdint>

namespace condconv {

struct View {
  const float* data = nullptr;
  int64_t sizes[5] = {};
  int64_t size(int dimension) const { return sizes[dimension]; }
};

enum class Element { FLOAT32, BFLOAT16, INT8 };

// Experts [E, O, I/G, kh, kw]. Those in int8 are multiplied by their scale [E, O], which is null for the others.
struct Weights {
  const void* data;
  Element element = Element::FLOAT32;
  const float* scale = nullptr;
  int64_t sizes[5] = {};
  Weights(const View& floats) : data(floats.data) {
    for (int i = 0; i < 5; i++) sizes[i] = floats.sizes[i];
  }
  Weights(const void* values, Element kind, const float* of_filters) : data(values), element(kind), scale(of_filters) {}
  int64_t size(int dimension) const { return sizes[dimension]; }
};

struct Gates {  // each sample's parts of the mixture, or null: [B, E], [B, kh, kw], [B, I], [B, O]
  const float *gate, *spatial, *before, *after;
};

struct PartGradients {  // of the experts and of the parts of the mixture; null where a part is absent
  float *experts, *gate, *spatial, *before, *after;
};

struct Geometry {
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t outputs(int64_t size, bool tall) const {
    return tall ? (size + 2 * ph - dh * (kh - 1) - 1) / sh + 1 : (size + 2 * pw - dw * (kw - 1) - 1) / sw + 1;
  }
};

struct Linear {  // weight [outputs, inputs]; bias [outputs] or null
  const float *weight, *bias;
  int64_t inputs, outputs;
};

struct BatchNorm {  // by running statistics, each [hidden]; mean is null where there is no norm
  const float *mean, *variance, *weight, *bias;
  double eps;
};

constexpr int MAX_HEADS = 4;

struct Attention {  // weight is null where a head is absent; the last one is a softmax
  Linear reduce;
  BatchNorm norm;
  bool relu;
  int count;
  Linear heads[MAX_HEADS];
  float temperature;
};

// x: [B, I, H, W]. experts: [E, O, I/G, kh, kw], with any G; depthwise: G = I = O. y, grad: [B, O, H', W'].
struct Kernels {
  void (*convolve)(const View& x, const Weights& experts, const Gates&, const Geometry&, float* y);
  void (*input_gradient)(const View& grad, const View& x, const View& experts, const Gates&, const Geometry&,
                         float* to_x);
  void (*kernel_gradients)(const View& grad, const View& x, const View& experts, const Gates&, const Geometry&,
                           const PartGradients& to);
  void (*depthwise_convolve)(const View& x, const Weights& experts, const Gates&, const Geometry&, float* y);
  void (*depthwise_input_gradient)(const View& grad, const View& x, const View& experts, const Gates&, const Geometry&,
                                   float* to_x);
  // of each sample's kernel: [B, C, 1, kh, kw]
  void (*depthwise_kernel_gradient)(const View& grad, const View& x, const Geometry&, float* to_kernels);
  void (*pool)(const View& x, float* pooled);  // [B, I]
  void (*sigmoid_gates)(const float* pooled, int64_t batch, const Linear&, float factor, float* gates);
  void (*attention)(const float* pooled, int64_t batch, const Attention&, float* const* outputs);
};

extern const Kernels AVX2_KERNELS, AVX512_KERNELS;

// torch's threads (operators.cpp).
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t begin, int64_t end, void* context),
                  void* context);
int64_t thread_count();

}  // namespace condconv
