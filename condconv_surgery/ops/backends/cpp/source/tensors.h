// torch's tensors as the kernels read them, by torch's stable ABI.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using condconv::Element;
using condconv::Geometry;
using condconv::View;
using condconv::Weights;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using Shape = std::initializer_list<int64_t>;

int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

bool is_float_on_cpu(const Tensor& t) {
  return t.is_cpu() && dtype_of(t) == aoti_torch_dtype_float32() && t.is_contiguous();
}

template <typename List>
bool has_sizes(const Tensor& t, const List& sizes) {
  const auto own = t.sizes();
  return own.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), own.begin());
}

bool is_ready(const Tensor& t, Shape sizes) { return has_sizes(t, sizes) && is_float_on_cpu(t); }
bool is_ready(const Maybe& t, Shape sizes) { return !t || is_ready(*t, sizes); }

template <typename List>
std::string text(const List& sizes) {
  std::string all;
  for (const int64_t size : sizes) all += (all.empty() ? "" : ", ") + std::to_string(size);
  return "[" + all + "]";
}

template <typename List = Shape>
void require(const Tensor& t, const List& sizes, const char* name) {
  STD_TORCH_CHECK(is_float_on_cpu(t), name, " must be a contiguous float32 tensor on the CPU");
  STD_TORCH_CHECK(has_sizes(t, sizes), name, " has the sizes ", text(t.sizes()), ", it must have ", text(sizes));
}

const float* data_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
const float* data_of(const Maybe& t) { return t ? data_of(*t) : nullptr; }
float* data_to(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

View view_of(const Tensor& t) {
  View view{data_of(t)};
  int dimension = 0;
  for (const int64_t size : t.sizes()) view.sizes[dimension++] = size;
  return view;
}

// Whether they are experts [E, O, I/G, kh, kw] as the kernels read them: in int8 with scales [E, O], or in bfloat16 or
// float32 without.
bool are_weights(const Tensor& t, const Maybe& scales) {
  if (t.dim() != 5 || !t.is_cpu() || !t.is_contiguous()) return false;
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_int8()) return scales && is_ready(*scales, {t.size(0), t.size(1)});
  return !scales && (dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float32());
}

Weights weights_of(const Tensor& t, const Maybe& scales) {
  const bool is_bfloat16 = dtype_of(t) == aoti_torch_dtype_bfloat16();
  const auto element = scales ? Element::INT8 : is_bfloat16 ? Element::BFLOAT16 : Element::FLOAT32;
  Weights weights{t.const_data_ptr(), element, data_of(scales)};
  int dimension = 0;
  for (const int64_t size : t.sizes()) weights.sizes[dimension++] = size;
  return weights;
}

Tensor empty(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace
