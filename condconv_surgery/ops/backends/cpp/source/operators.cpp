// The kernels as torch's operators, in torch's stable ABI: one build serves every torch from 2.10 on, and every Python.
// ``operators.py`` adds what a compiler and autograd need to know of them, ``cpp_backend.py`` decides when they are
// used.

#include "convolutions.h"
#include "routers.h"

namespace condconv {

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, work, context));
}

int64_t thread_count() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return count;
}

}  // namespace condconv

// Which kernels to use, by torch's name of the instructions; false where this processor or the library lacks them.
extern "C" __attribute__((visibility("default"))) bool condconv_use(const char* instructions) {
  const std::string name = instructions;
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx512" && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
    used = &condconv::AVX512_KERNELS;
  else if (name == "avx2" && fma)
    used = &condconv::AVX2_KERNELS;
  else
    return false;
  return true;
}

// The digest of the sources that the library was built from.
extern "C" __attribute__((visibility("default"))) const char* condconv_sources() { return CONDCONV_SOURCES; }

#define LAYER "Tensor x, Tensor experts, "
#define ROUNDED LAYER "Tensor? scales, "
#define MIXTURE "Tensor? gate, Tensor? spatial, Tensor? in_scale, Tensor? out_scale, "
#define GEOMETRY "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
#define SINGLE_VALUES                                                                                            \
  "SymInt stride_h, SymInt stride_w, SymInt padding_h, SymInt padding_w, SymInt dilation_h, SymInt dilation_w, " \
  "SymInt groups"
#define ATTENTION \
  "Tensor[] reduce, Tensor[] norm, float eps, bool relu, Tensor temperature, Tensor[] heads, int present"

STABLE_TORCH_LIBRARY_FRAGMENT(condconv_surgery, library) {
  library.def("cpp_convolve(" LAYER MIXTURE GEOMETRY ") -> Tensor");
  library.def("cpp_convolve_without_autograd(" LAYER MIXTURE GEOMETRY ") -> Tensor");
  library.def("cpp_convolve_rounded(" ROUNDED MIXTURE GEOMETRY ") -> Tensor");
  library.def("cpp_input_gradient(Tensor grad, " LAYER MIXTURE GEOMETRY ") -> Tensor");
  library.def("cpp_kernel_gradients(Tensor grad, " LAYER MIXTURE GEOMETRY ") -> Tensor[]");
  library.def("cpp_depthwise_kernel_gradient(Tensor grad, " LAYER GEOMETRY ") -> Tensor");
  library.def("cpp_pool(Tensor x) -> Tensor?");
  library.def("cpp_sigmoid_gates(Tensor pooled, Tensor weight, Tensor? bias, float factor) -> Tensor?");
  library.def("cpp_attention(Tensor pooled, " ATTENTION ") -> Tensor[]");
  library.def("cpp_sigmoid_layer(" ROUNDED
              "Tensor? bias, Tensor weight, Tensor? router_bias, float factor, " SINGLE_VALUES ") -> Tensor?");
  library.def("cpp_attention_layer(" ROUNDED "Tensor? bias, " ATTENTION
              ", Tensor? gates, Tensor? gates_bias, float factor, " SINGLE_VALUES ") -> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(condconv_surgery, CPU, library) {
  library.impl("cpp_convolve", TORCH_BOX(&convolve));
  library.impl("cpp_convolve_without_autograd", TORCH_BOX(&convolve));
  library.impl("cpp_convolve_rounded", TORCH_BOX(&convolve_rounded));
  library.impl("cpp_input_gradient", TORCH_BOX(&input_gradient));
  library.impl("cpp_kernel_gradients", TORCH_BOX(&kernel_gradients));
  library.impl("cpp_depthwise_kernel_gradient", TORCH_BOX(&depthwise_kernel_gradient));
  library.impl("cpp_pool", TORCH_BOX(&pool));
  library.impl("cpp_sigmoid_gates", TORCH_BOX(&sigmoid_gates));
  library.impl("cpp_attention", TORCH_BOX(&attention));
  library.impl("cpp_sigmoid_layer", TORCH_BOX(&sigmoid_layer));
  library.impl("cpp_attention_layer", TORCH_BOX(&attention_layer));
}
