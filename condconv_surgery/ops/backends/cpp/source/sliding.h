// One padded map and a window that slides over it: each tap of a kernel is one value times neighbouring positions.
//
// Positions that are loaded serve all taps of a column, for as many rows of the result: loads are what limits this.

#pragma once

#include "common.h"

namespace {

constexpr int64_t ROWS = 8;        // of a tile: 8 sums, the taps of a column and 1 factor fit in 16 registers
constexpr int64_t TALLEST = 7;     // taps of a column
constexpr int64_t MANY_TAPS = 25;  // from here on the widest vectors are faster: .85 of the time for 7x7, 1.15 for 3x3
constexpr int64_t AHEAD = 512;     // floats of a map that are prefetched before they are copied

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

// Taps one below the other, as many as a group of columns says: tap i is kernel[tap + i * apart] and reads at offset,
// plus i rows of the window.
struct Column {
  int64_t tap, apart, offset;
};

// Where a tap's row reads, in rows of the padded map, and its number.
struct TapRow {
  int64_t reach, tap;
};

// Positions of a result, and the taps of each: all of a convolution; of its transpose those of one phase of the stride.
// Its rows are ``pitch`` apart in the padded map, so that a row that is loaded serves all taps of a column.
struct Window {
  std::vector<Column> columns[TALLEST];  // by their taps, from one on
  int64_t taps = 0;
  int64_t start, pitch;      // in the padded map: of the first position, from one row to the next
  int64_t first, step, row;  // in the result: of the first position, to the next one, to the next row
  int64_t height, width;     // positions
  bool overwritten = false;  // what a row writes past its end, the next row overwrites

  int64_t runs() const { return height * ((width + LANES - 1) / LANES); }

  // The taps of some rows at one offset. unit: rows of the padded map from one row of the window to the next. across:
  // taps in a row of the kernel.
  void add_taps(std::vector<TapRow> rows, int64_t unit, int64_t across, int64_t column_tap, int64_t column_offset,
                int64_t row_offset) {
    std::sort(rows.begin(), rows.end(), [&](const TapRow& a, const TapRow& b) {
      return std::pair(a.reach % unit, a.reach) < std::pair(b.reach % unit, b.reach);
    });
    const int64_t count = rows.size();
    taps += count;
    for (int64_t from = 0, to; from < count; from = to) {
      for (to = from + 1; to < count && rows[to].reach - rows[to - 1].reach == unit;) to++;
      const int64_t parts = (to - from + TALLEST - 1) / TALLEST;
      for (int64_t part = 0, at = from; part < parts; part++) {
        const int64_t size = (to - at + parts - part - 1) / (parts - part);
        const int64_t apart = size > 1 ? (rows[at + 1].tap - rows[at].tap) * across : 0;
        columns[size - 1].push_back(
            {rows[at].tap * across + column_tap, apart, column_offset + rows[at].reach * row_offset});
        at += size;
      }
    }
  }
};

// sums[h] += sum over columns and their K taps: kernel[tap i] * base[offset + (h + i) * pitch], for one vector of
// positions in each of H rows. Of each column H + K - 1 rows are loaded for H * K products.
template <typename V, int K, int H>
void slide(const std::vector<Column>& columns, const float* base, int64_t pitch, const float* kernel, V* sums) {
  V c[H];
#pragma GCC unroll 8
  for (int h = 0; h < H; h++) c[h] = sums[h];
  for (const Column& column : columns) {
    V k[K];
#pragma GCC unroll 8
    for (int i = 0; i < K; i++) k[i] = V{} + kernel[column.tap + i * column.apart];
    const float* row = base + column.offset;
#pragma GCC unroll 16
    for (int r = 0; r < H + K - 1; r++, row += pitch) {
      const V v = load_as<V>(row);
#pragma GCC unroll 8
      for (int i = 0; i < K; i++)
        if (r - i >= 0 && r - i < H) c[r - i] += k[i] * v;
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; h++) sums[h] = c[h];
}

// to[i] += sum_h side[h] * base[offset + (h + i) * pitch] for each column: the positions of one vector in H rows, whose
// products are summed later. Nothing is read past the end of a row: zero times NaN is NaN.
template <typename V, int K, int H>
void correlate(const std::vector<Column>& columns, const float* base, int64_t pitch, const V* side,
               const MaskOf<V>* some, float* to) {
  V s[H];
#pragma GCC unroll 8
  for (int h = 0; h < H; h++) s[h] = side[h];
  for (const Column& column : columns) {
    V c[K];
#pragma GCC unroll 8
    for (int i = 0; i < K; i++) c[i] = load_as<V>(to + i * LANES_OF<V>);
    const float* row = base + column.offset;
#pragma GCC unroll 16
    for (int r = 0; r < H + K - 1; r++, row += pitch) {
      const V v = some ? load_some(row, *some) : load_as<V>(row);
#pragma GCC unroll 8
      for (int i = 0; i < K; i++)
        if (r - i >= 0 && r - i < H) c[i] += s[r - i] * v;
    }
#pragma GCC unroll 8
    for (int i = 0; i < K; i++) store_as<V>(to + i * LANES_OF<V>, c[i]);
    to += K * LANES_OF<V>;
  }
}

// of<K, H>() for every K and H, as a table.
template <typename Of, size_t... I>
constexpr auto table_of(Of of, std::index_sequence<I...>) {
  return std::array{of.template operator()<int(I) / ROWS + 1, int(I) % ROWS + 1>()...};
}
using Shapes = std::make_index_sequence<TALLEST * ROWS>;
template <typename V>
constexpr auto SLIDES = table_of([]<int K, int H>() { return &slide<V, K, H>; }, Shapes());
template <typename V>
constexpr auto CORRELATES = table_of([]<int K, int H>() { return &correlate<V, K, H>; }, Shapes());

// Calls use(V{}): with the widest vectors where these take no more lanes for a row than eight would, and taps are many.
template <typename Use>
void with_vectors(const Window& window, const Use& use) {
  const int64_t rest = window.width % WIDEST;
  if (window.taps >= MANY_TAPS && (rest == 0 || rest > WIDEST - LANES)) return use(Widest{});
  use(Vec{});
}

// of_tile(first row, rows, first position, positions) for up to ROWS rows and one V of positions at a time. The last
// positions of rows come before the others of the same rows, which may overwrite what lies past them.
template <typename V, typename Use>
void for_each_tile(const Window& window, const Use& of_tile) {
  constexpr int64_t N = LANES_OF<V>;
  const int64_t tiles = (window.height + ROWS - 1) / ROWS, last = (window.width - 1) / N * N;
  for (int64_t tile = 0, h = 0; tile < tiles; tile++) {
    const int64_t rows = (window.height - h + tiles - tile - 1) / (tiles - tile);
    for (int64_t w = last; w >= 0; w -= N) of_tile(h, rows, w, std::min(N, window.width - w));
    h += rows;
  }
}

template <typename V>
void slide_over(const Window& window, const float* base, const float* kernel, float* y, int64_t size) {
  constexpr int64_t N = LANES_OF<V>;
  for_each_tile<V>(window, [&](int64_t first, int64_t rows, int64_t w, int64_t count) {
    V sums[ROWS] = {};
    for (int64_t k = 0; k < TALLEST; k++)
      if (!window.columns[k].empty())
        SLIDES<V>[k * ROWS + rows - 1](window.columns[k], base + window.start + first * window.pitch + w, window.pitch,
                                       kernel, sums);
    for (int64_t h = 0; h < rows; h++) {
      const int64_t to = window.first + (first + h) * window.row + w * window.step;
      if (window.step == 1 && (count == N || (window.overwritten && to + N <= size)))
        store_as<V>(y + to, sums[h]);
      else
        for (int64_t p = 0; p < count; p++) y[to + p * window.step] = sums[h][p];
    }
  });
}

// The products of a window's taps with ``from``, a map of its positions, summed over these: to[tap].
template <typename V>
void correlate_over(const Window& window, const float* base, const float* from, float* products, float* to) {
  constexpr int64_t N = LANES_OF<V>;
  std::fill_n(products, window.taps * N, 0.f);
  for_each_tile<V>(window, [&](int64_t first, int64_t rows, int64_t w, int64_t count) {
    const MaskOf<V> some = mask_for<V>(count);
    V side[ROWS];
    for (int64_t h = 0; h < rows; h++) {
      const float* row = from + (first + h) * window.row + w;
      side[h] = count == N ? load_as<V>(row) : load_some(row, some);
    }
    float* of_columns = products;
    for (int64_t k = 0; k < TALLEST; k++) {
      if (window.columns[k].empty()) continue;
      CORRELATES<V>[k * ROWS + rows - 1](window.columns[k], base + window.start + first * window.pitch + w,
                                         window.pitch, side, count == N ? nullptr : &some, of_columns);
      of_columns += (k + 1) * window.columns[k].size() * N;
    }
  });
  for (int64_t k = 0; k < TALLEST; k++)
    for (const Column& column : window.columns[k])
      for (int64_t i = 0; i <= k; i++, products += N) to[column.tap + i * column.apart] = sum_of(load_as<V>(products));
}

}  // namespace
