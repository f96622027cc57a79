// Dense layers: the gradients of the experts and of the parts of the mixture.

#pragma once

#include "dense.h"

namespace {

constexpr int64_t POSITIONS = 256;  // of a gradient's panel: 32 KB; 16 KB with AVX2

constexpr int EXPERTS_AT_ONCE = WIDEST > LANES ? 4 : 2;  // limited by registers for their gates of all samples

// For each of some samples: to_experts[e] += gate[e] * of_kernel and to_gate[e] += of_kernel . packed[e], for some
// experts. Panels have ``size`` floats and are contiguous, those of samples and those of experts; the gates of the
// samples are ``gate_step`` apart. Each sum of experts is read and written once for all samples: it is in the second
// level of cache.
template <int EXPERTS, int SOME>
void unmix(const float* of_kernel, const float* gate, int64_t gate_step, const float* packed, int64_t size,
           float* to_experts, float* to_gate) {
  float g[SOME][EXPERTS];
  for (int b = 0; b < SOME; b++)
    for (int e = 0; e < EXPERTS; e++) g[b][e] = gate ? gate[b * gate_step + e] : 1.f;
  for (int64_t k = 0; k < size; k += WIDEST) {
    Widest sums[EXPERTS];
#pragma GCC unroll 4
    for (int e = 0; e < EXPERTS; e++) sums[e] = load_widest(to_experts + e * size + k);
#pragma GCC unroll 4
    for (int b = 0; b < SOME; b++) {
      const Widest of = load_widest(of_kernel + b * size + k);
#pragma GCC unroll 4
      for (int e = 0; e < EXPERTS; e++) sums[e] += g[b][e] * of;
    }
#pragma GCC unroll 4
    for (int e = 0; e < EXPERTS; e++) store_widest(to_experts + e * size + k, sums[e]);
  }
  if (!to_gate) return;
  Widest products[SOME][EXPERTS] = {};
  for (int64_t k = 0; k < size; k += WIDEST) {
    Widest of_expert[EXPERTS];
#pragma GCC unroll 4
    for (int e = 0; e < EXPERTS; e++) of_expert[e] = load_widest(packed + e * size + k);
#pragma GCC unroll 4
    for (int b = 0; b < SOME; b++) {
      const Widest of = load_widest(of_kernel + b * size + k);
#pragma GCC unroll 4
      for (int e = 0; e < EXPERTS; e++) products[b][e] += of * of_expert[e];
    }
  }
  for (int b = 0; b < SOME; b++)
    for (int e = 0; e < EXPERTS; e++) to_gate[b * gate_step + e] += sum_of(products[b][e]);
}

template <int EXPERTS>
constexpr std::array UNMIXES_OF = {unmix<EXPERTS, 1>, unmix<EXPERTS, 2>, unmix<EXPERTS, 3>, unmix<EXPERTS, 4>};
constexpr std::array UNMIXES = {UNMIXES_OF<1>, UNMIXES_OF<2>, UNMIXES_OF<3>, UNMIXES_OF<4>};  // by experts and samples

void unmix_samples(const float* of_kernel, int64_t samples, const float* gate, int64_t experts, const float* packed,
                   int64_t size, float* to_experts, float* to_gate) {
  for (int64_t e = 0; e < experts; e += EXPERTS_AT_ONCE) {
    const int64_t some = std::min<int64_t>(EXPERTS_AT_ONCE, experts - e);
    UNMIXES[some - 1][samples - 1](of_kernel, gate ? gate + e : nullptr, experts, packed + e * size, size,
                                   to_experts + e * size, to_gate ? to_gate + e : nullptr);
  }
}

// The input of all units of one pass. image: its samples, from ``first`` of the batch on; grad: of the whole output.
struct UnitInput {
  const Experts& experts;
  const Phase& phase;
  const Gates& gates;
  const Image& image;
  const float* grad;
  int64_t first;
};

// The sums of a unit: panels [E][depth][WIDE] and, for all samples, [B, E], [B, taps], [B, I], [B, O], or null.
struct Sums {
  float *experts, *gate, *spatial, *before, *after;
};

// The gradients of the kernels' parts for the filters of a panel and the channels of a chunk: a unit of work.
class UnitGradient {
 public:
  UnitGradient(const UnitInput& input, int64_t panel, const Chunk& chunk, const Sums& sums)
      : input_(input),
        experts_(input.experts),
        panel_(panel),
        chunk_(chunk),
        sums_(sums),
        positions_(input.phase.positions.size()),
        channel_(experts_.first_channel(panel) + chunk.first),
        filter_(experts_.first_filter(panel)),
        step_(chunk.depth * WIDE),
        rows_(offsets_of(chunk, input.phase, input.image.channel)),
        packed_(experts_.experts * step_),
        mixtures_(samples_at_once() * step_),
        of_taps_(experts_.taps * WIDEST),
        of_kernel_(samples_at_once() * step_),
        side_(std::min(POSITIONS, positions_) * WIDE) {
    Packer packer(experts_, input.phase, chunk.depth);
    for (int64_t e = 0; e < experts_.experts; e++) packer.pack(panel, chunk, e, packed_.data() + e * step_);
  }

  void add(int64_t samples) {
    for (int64_t i = 0; i < samples; i += samples_at_once()) add(i, std::min(samples_at_once(), samples - i));
  }

  void unpack(float* to_experts) const {
    const Packer packer(experts_, input_.phase, chunk_.depth);
    for (int64_t e = 0; e < experts_.experts; e++)
      packer.unpack(panel_, chunk_, e, sums_.experts + e * step_, to_experts);
  }

 private:
  // With few positions, adding to the experts takes as long as the products: it is done for some samples together.
  int64_t samples_at_once() const { return positions_ <= POSITIONS ? SAMPLES : 1; }

  void add(int64_t first, int64_t samples) {
    const int64_t n = experts_.experts, b = input_.first + first;
    const float* gate = input_.gates.gate ? input_.gates.gate + b * n : nullptr;
    const bool scaled = input_.gates.spatial || input_.gates.before || input_.gates.after;
    if (scaled && gate) MIXES[samples - 1](packed_.data(), step_, n, gate, chunk_.depth, mixtures_.data());
    for (int64_t i = 0; i < samples; i++) {
      multiply(first + i, i);
      if (scaled)
        differentiate_scales(b + i, gate ? mixtures_.data() + i * step_ : packed_.data(),
                             of_kernel_.data() + i * step_);
    }
    unmix_samples(of_kernel_.data(), samples, gate, n, packed_.data(), step_, sums_.experts,
                  sums_.gate ? sums_.gate + b * n : nullptr);
  }

  // Writes the gradient of the kernel of one sample of the image.
  void multiply(int64_t sample, int64_t place) {
    const float* base = input_.image.data + sample * input_.image.sample + channel_ * input_.image.channel;
    const float* grad = input_.grad + ((input_.first + sample) * experts_.all_filters() + filter_) * positions_;
    float* of_kernel = of_kernel_.data() + place * step_;
    std::fill_n(of_kernel, step_, 0.f);
    for (int64_t p = 0; p < positions_; p += POSITIONS) {
      const int64_t some = std::min(POSITIONS, positions_ - p);
      float* side = side_.data();
      const int64_t count = experts_.count(panel_);
      transpose_rows(grad + p, positions_, count, some, side);
      const auto multiply_tiles = experts_.taps == 1 ? tiles_for<Ask::OWN>(count) : tiles_for<Ask::SECOND>(count);
      const int64_t* at = input_.phase.positions.data() + p;
      const int64_t beyond = p + some < positions_ ? at[some] - at[0] : input_.image.sample;
      multiply_tiles(base, rows_.data(), chunk_.depth, at, some, side, of_kernel, beyond, {}, {});
    }
  }

  // From d, the gradient of spatial * before * after * mixture, to that of the mixture, in place, and those of the
  // scales.
  void differentiate_scales(int64_t b, const float* mixture, float* d) {
    const Gates& gates = input_.gates;
    const int64_t taps = experts_.taps, channels = experts_.all_channels();
    const int64_t filter = b * experts_.all_filters() + filter_;
    const float* spatial = gates.spatial ? gates.spatial + b * taps : nullptr;
    float padded[WIDE], to_after[WIDE];
    for (int64_t f = 0; f < WIDE; f++)
      padded[f] = f >= experts_.count(panel_) ? 0.f : gates.after ? gates.after[filter + f] : 1.f;
    Widest after[PIECES], of_filters[PIECES] = {};
    for (int i = 0; i < PIECES; i++) after[i] = load_widest(padded + i * WIDEST);
    std::fill(of_taps_.begin(), of_taps_.end(), 0.f);
    for (int64_t channel = channel_; channel < channel_ + chunk_.channels; channel++) {
      const float before = gates.before ? gates.before[b * channels + channel] : 1.f;
      Widest of_channel = {};
      for (int64_t tap = 0; tap < taps; tap++)
        for (int i = 0; i < PIECES; i++, d += WIDEST, mixture += WIDEST) {
          const float s = spatial ? spatial[tap] : 1.f, scale = s * before;
          const Widest of = load_widest(d), product = of * load_widest(mixture), after_product = product * after[i];
          float* of_tap = of_taps_.data() + tap * WIDEST;
          if (spatial) store_widest(of_tap, load_widest(of_tap) + before * after_product);
          of_channel += s * after_product;
          of_filters[i] += scale * product;
          store_widest(d, of * after[i] * scale);
        }
      if (sums_.before) sums_.before[b * channels + channel] += sum_of(of_channel);
    }
    for (int64_t tap = 0; tap < taps && sums_.spatial; tap++)
      sums_.spatial[b * taps + tap] += sum_of(load_widest(of_taps_.data() + tap * WIDEST));
    for (int i = 0; i < PIECES; i++) store_widest(to_after + i * WIDEST, of_filters[i]);
    for (int64_t f = 0; f < experts_.count(panel_) && sums_.after; f++) sums_.after[filter + f] += to_after[f];
  }

  const UnitInput& input_;
  const Experts& experts_;
  const int64_t panel_;
  const Chunk& chunk_;
  const Sums sums_;
  const int64_t positions_;
  const int64_t channel_, filter_;  // the first ones
  const int64_t step_;  // floats from one expert's panel, or one sample's, to the next
  const Sizes rows_;
  Buffer packed_, mixtures_, of_taps_, of_kernel_, side_;
};

// One slice for each unit that could add to the same sums of a part at the same time; none where it is absent.
class Slices {
 public:
  Slices(bool present, int64_t slices, int64_t size)
      : slices_(slices), size_(size), sums_(present ? Scratch::zeros(slices * size) : Scratch()) {}

  float* operator[](int64_t i) const { return sums_.data() ? sums_.data() + i * size_ : nullptr; }

  void add_up(float* to) const {
    if (!to) return;
    std::fill_n(to, size_, 0.f);
    for (int64_t i = 0; i < slices_; i++)
      for (int64_t k = 0; k < size_; k++) to[k] += sums_.data()[i * size_ + k];
  }

 private:
  int64_t slices_, size_;
  Scratch sums_;
};

// The gradients of the experts and of the parts of the mixture that are present.
void kernel_gradients(const View& grad, const View& all, const View& weight, const Gates& gates,
                      const Geometry& geometry, const PartGradients& to) {
  const Visited visited(all, geometry);
  const View& x = visited.x;
  const Geometry& g = visited.g;
  const Experts experts(weight, x, false);
  const PadAmounts pads{g.ph, g.ph, g.pw, g.pw};
  const Phase phase = forward_phase(g, x.size(3) + 2 * g.pw, grad.size(2), grad.size(3));
  const auto chunks = chunks_of(experts, experts.taps, DEPTH);
  const int64_t B = x.size(0), I = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t panels = experts.panels(), parts = chunks.size(),
                size = experts.experts * experts.channels * experts.taps;
  // without padding nothing is copied, and all samples are computed at a time
  const int64_t some = pads.any() ? samples_at_a_time(x, pads, experts) : B;
  const Slices of_gate(gates.gate, panels * parts, B * experts.experts);
  const Slices of_spatial(gates.spatial, panels * parts, B * experts.taps);
  const Slices of_before(gates.before, experts.panels_of_group, B * I);
  const Slices of_after(gates.after, parts, B * experts.all_filters());
  in_large_pages(to.experts, size * experts.all_filters());
  const Slices total(some < B, panels, size * WIDE);  // carried from one pass to the next
  for (int64_t b = 0; b < B; b += some) {
    const int64_t n = std::min(some, B - b);
    const Image image(x.data + b * I * H * W, n, I, H, W, nullptr, pads);
    const UnitInput input{experts, phase, gates, image, grad.data, b};
    parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
      Buffer own;
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t part = unit % parts, panel = unit / parts;
        const Chunk& chunk = chunks[part];
        float* sum = total[panel];
        if (sum)
          sum += experts.experts * chunk.first * experts.taps * WIDE;
        else
          own.assign(experts.experts * chunk.depth * WIDE, 0.f), sum = own.data();
        float* before = of_before[panel % experts.panels_of_group];  // groups have channels of their own
        UnitGradient gradient(input, panel, chunk, {sum, of_gate[unit], of_spatial[unit], before, of_after[part]});
        gradient.add(n);
        if (b + n == B) gradient.unpack(to.experts);
      }
    });
  }
  of_gate.add_up(to.gate), of_spatial.add_up(to.spatial), of_before.add_up(to.before), of_after.add_up(to.after);
}

}  // namespace
