// The compiled kernels as a Python module. ``cpp_backend.py`` decides when they are used.

#include "dense_gradients.h"
#include "depthwise.h"
#include "routing.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto free = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("convolve", &convolve, free);
  m.def("input_gradient", &input_gradient, free);
  m.def("kernel_gradients", &kernel_gradients, free);
  m.def("depthwise_convolve", &depthwise_convolve, free);
  m.def("depthwise_input_gradient", &depthwise_input_gradient, free);
  m.def("depthwise_kernel_gradient", &depthwise_kernel_gradient, free);
  m.def("pool", &pool, free);
  m.def("sigmoid_gates", &sigmoid_gates, free);
  m.def("attention", &attention, free);
}
