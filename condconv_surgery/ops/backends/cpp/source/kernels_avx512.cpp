#include "standard_library.h"

// Not a flag of the compiler: see kernels_avx2.cpp.
#pragma GCC target("avx512f,avx512vl,fma")

#include "all_kernels.h"

namespace condconv {
extern const Kernels AVX512_KERNELS = ALL_KERNELS;
}
