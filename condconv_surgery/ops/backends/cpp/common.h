// Shared by all kernels: vectors, the parts of a mixture, the geometry of a convolution, and checks of tensors.

#pragma once

#include <ATen/Parallel.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <torch/extension.h>

#include <algorithm>
#include <new>
#include <vector>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
#ifdef __AVX512F__
typedef float Widest __attribute__((vector_size(64), aligned(4), may_alias));
#else
typedef Vec Widest;
#endif

typedef int Mask __attribute__((vector_size(32)));

constexpr int64_t LANES = 8;
constexpr int64_t WIDEST = sizeof(Widest) / sizeof(float);
constexpr int64_t LINE = 16;  // floats of a cache line

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Widest load_widest(const float* p) { return *reinterpret_cast<const Widest*>(p); }
inline void store_widest(float* p, Widest v) { *reinterpret_cast<Widest*>(p) = v; }
// A mask of the first ``count`` lanes: all for 8 or more, none for 0 or less.
inline Mask mask_of(int64_t count) {
  Mask m;
  for (int i = 0; i < LANES; i++) m[i] = i < count ? -1 : 0;
  return m;
}
inline Vec load_some(const float* p, Mask m) { return _mm256_maskload_ps(p, (__m256i)m); }
inline float sum_of(Vec v) {
  const auto fours = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const auto twos = fours + __builtin_shufflevector(fours, fours, 1, 0, 3, 2);
  return twos[0] + twos[2];
}
#ifdef __AVX512F__
inline float sum_of(Widest v) {
  const Vec low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  return sum_of(low + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif
const float* data_of(const Maybe& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// A buffer of floats that is aligned to a cache line, so that none of the widest loads touches two.
template <typename T>
struct CacheLineAllocator {
  using value_type = T;
  static constexpr std::align_val_t LINE_BYTES{LINE * sizeof(float)};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE_BYTES)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE_BYTES); }
  bool operator==(const CacheLineAllocator&) const = default;
};
using Buffer = std::vector<float, CacheLineAllocator<float>>;

// As in ops/large_pages.py: ask for large pages for memory that was never touched, where the system has them.
Tensor in_large_pages(Tensor memory) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t first = (start + LARGE - 1) / LARGE * LARGE, last = (start + memory.nbytes()) / LARGE * LARGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return memory;
}

struct PadAmounts {
  int64_t top, bottom, left, right;
  bool any() const { return top + bottom + left + right > 0; }
};

struct Gates {  // pointers to each sample's parts of the mixture, or null
  const float *gate, *spatial, *before, *after;
};

struct Geometry {
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t outputs(int64_t size, bool tall) const {
    return tall ? (size + 2 * ph - dh * (kh - 1) - 1) / sh + 1 : (size + 2 * pw - dw * (kw - 1) - 1) / sw + 1;
  }
};

Geometry geometry_of(const Tensor& experts, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  return {experts.size(3), experts.size(4), stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

// Everything that the loops rely on. Sizes are those of a forward pass on ``x``.
void check(const Tensor& x, const Tensor& experts, const Maybe& gate, const Maybe& spatial, const Maybe& before,
           const Maybe& after, const Geometry& g, bool depthwise) {
  auto require = [](const Tensor& t, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous(), name,
                " must be a contiguous float32 tensor on the CPU");
    TORCH_CHECK(t.sizes() == sizes, name, " has the sizes ", t.sizes(), ", it must have ", sizes);
  };
  TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && experts.dim() == 5 && experts.numel() > 0,
              "nothing to convolve: x has the sizes ", x.sizes(), ", the experts have ", experts.sizes());
  const int64_t B = x.size(0), E = experts.size(0), O = experts.size(1), I = x.size(1);
  require(x, x.sizes(), "x");
  TORCH_CHECK(!depthwise || O == I, O, " filters for ", I, " channels of a depthwise convolution");
  require(experts, {E, O, depthwise ? 1 : I, g.kh, g.kw}, "experts");
  if (gate)
    require(*gate, {B, E}, "the gate");
  else
    TORCH_CHECK(E == 1, E, " experts need a gate");
  if (spatial) require(*spatial, {B, g.kh, g.kw}, "the spatial part");
  if (before) require(*before, {B, I}, "the scale of the input");
  if (after) require(*after, {B, O}, "the scale of the output");
  TORCH_CHECK(x.size(2) + 2 * g.ph > g.dh * (g.kh - 1) && x.size(3) + 2 * g.pw > g.dw * (g.kw - 1),
              "Kernel size can't be greater than actual input size: x has the sizes ", x.sizes(), ", the experts ",
              experts.sizes());
}

// The pixels of one dimension in one phase of the stride: their taps, and where these read in the gradient.
struct Step {
  Sizes taps, reach, pixels, starts;
};

struct Steps {
  int64_t before, after;  // padding of the gradient
  std::vector<Step> steps;

  Steps(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t size, int64_t outputs)
      : before((dilation * (kernel - 1) + stride - 1) / stride),
        after(std::max<int64_t>(0, (size - 1 + padding) / stride - outputs + 1)),
        steps(stride) {
    for (int64_t phase = 0; phase < stride; phase++)
      for (int64_t k = 0; k < kernel; k++)
        if ((phase - k * dilation) % stride == 0) {
          steps[phase].taps.push_back(k);
          steps[phase].reach.push_back((phase - k * dilation) / stride + before);
        }
    for (int64_t h = 0; h < size; h++) {
      steps[(h + padding) % stride].pixels.push_back(h);
      steps[(h + padding) % stride].starts.push_back((h + padding) / stride);
    }
  }
};

// Calls of_phase(tall, wide) for every phase of the stride that has pixels and taps. Returns the sum of their pixels.
template <typename Work>
int64_t for_each_phase(const Steps& tall, const Steps& wide, const Work& of_phase) {
  int64_t pixels = 0;
  for (const Step& a : tall.steps)
    for (const Step& b : wide.steps) {
      if (a.taps.empty() || b.taps.empty() || a.pixels.empty() || b.pixels.empty()) continue;
      of_phase(a, b);
      pixels += a.pixels.size() * b.pixels.size();
    }
  return pixels;
}

void check_gradient(const Tensor& grad, const Tensor& x, const Tensor& experts, const Geometry& g) {
  const Sizes sizes{x.size(0), experts.size(1), g.outputs(x.size(2), true), g.outputs(x.size(3), false)};
  TORCH_CHECK(grad.is_contiguous() && grad.scalar_type() == at::kFloat && grad.device().is_cpu() &&
                  grad.sizes() == at::IntArrayRef(sizes),
              "the gradient has the sizes ", grad.sizes(), ", it must be contiguous, float32, and have ",
              at::IntArrayRef(sizes));
}

}  // namespace
