// The table of kernels, for the instructions that the including file chose.

#pragma once

#include "dense_gradients.h"
#include "depthwise.h"
#include "routing.h"

namespace {

constexpr condconv::Kernels ALL_KERNELS = {
    convolve, input_gradient, kernel_gradients, depthwise_convolve, depthwise_input_gradient, depthwise_kernel_gradient,
    pool,     sigmoid_gates,  attention,
};

}  // namespace
