// Shared by all kernels: vectors, buffers, threads, the phases of a stride.

#pragma once

#include "standard_library.h"

namespace {

using condconv::Element;
using condconv::Gates;
using condconv::Geometry;
using condconv::PartGradients;
using condconv::View;
using condconv::Weights;
using Sizes = std::vector<int64_t>;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
#if CONDCONV_AVX512
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

// Rounded experts as floats.
struct Bfloat16 {
  uint16_t bits;
};
inline float as_float(float v) { return v; }
inline float as_float(int8_t v) { return v; }
inline float as_float(Bfloat16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }
inline Vec load(const int8_t* p) {
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const Bfloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Widest load_widest(const int8_t* p) {
#if CONDCONV_AVX512
  return (Widest)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return load(p);
#endif
}
inline Widest load_widest(const Bfloat16* p) {
#if CONDCONV_AVX512
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Widest)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  return load(p);
#endif
}
// use(pointer) with the type of the elements at ``data``.
template <typename Use>
void typed(Element element, const void* data, const Use& use) {
  if (element == Element::INT8) return use(static_cast<const int8_t*>(data));
  if (element == Element::BFLOAT16) return use(static_cast<const Bfloat16*>(data));
  use(static_cast<const float*>(data));
}
inline int64_t bytes_of(Element element) { return element == Element::INT8 ? 1 : element == Element::BFLOAT16 ? 2 : 4; }

inline Vec load_some(const float* p, Mask m) { return _mm256_maskload_ps(p, (__m256i)m); }
inline float sum_of(Vec v) {
  const auto fours = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const auto twos = fours + __builtin_shufflevector(fours, fours, 1, 0, 3, 2);
  return twos[0] + twos[2];
}
#if CONDCONV_AVX512
inline Widest load_some(const float* p, __mmask16 m) { return (Widest)_mm512_maskz_loadu_ps(m, p); }
inline float sum_of(Widest v) {
  const Vec low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  return sum_of(low + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// The same for either vector as V, which as an argument of a template loses the attributes of its name.
template <typename V>
constexpr int64_t LANES_OF = sizeof(V) / sizeof(float);
template <typename V>
inline V load_as(const float* p) {
  if constexpr (LANES_OF<V> == LANES)
    return load(p);
  else
    return load_widest(p);
}
template <typename V>
inline void store_as(float* p, V v) {
  if constexpr (LANES_OF<V> == LANES)
    store(p, v);
  else
    store_widest(p, v);
}
template <typename V>
inline auto mask_for(int64_t count) {
#if CONDCONV_AVX512
  if constexpr (LANES_OF<V> == WIDEST)
    return __mmask16((1 << std::min(count, WIDEST)) - 1);
  else
#endif
    return mask_of(count);
}
template <typename V>
using MaskOf = decltype(mask_for<V>(0));

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

// Memory for floats that is not touched before it is written, aligned to a cache line.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) : data_(CacheLineAllocator<float>().allocate(count)), count_(count) {}
  static Scratch zeros(int64_t count) {
    Scratch scratch(count);
    std::fill_n(scratch.data(), count, 0.f);
    return scratch;
  }
  float* data() const { return data_.get(); }
  int64_t count() const { return count_; }

 private:
  struct Delete {
    void operator()(float* p) const { CacheLineAllocator<float>().deallocate(p, 0); }
  };
  std::unique_ptr<float, Delete> data_;
  int64_t count_ = 0;
};

// As in ops/large_pages.py: ask for large pages for memory that was never touched, where the system has them.
void in_large_pages(float* memory, int64_t count) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + LARGE - 1) / LARGE * LARGE, last = (start + count * sizeof(float)) / LARGE * LARGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// work(begin, end) by torch's threads, at least ``grain`` of the range for each.
template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  if (end - begin <= grain) {
    if (begin < end) work(begin, end);
    return;
  }
  condconv::parallel_for(
      begin, end, grain,
      [](int64_t from, int64_t to, void* context) { (*static_cast<const Work*>(context))(from, to); },
      const_cast<Work*>(&work));
}

struct PadAmounts {
  int64_t top, bottom, left, right;
  bool any() const { return top + bottom + left + right > 0; }
};

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

}  // namespace
