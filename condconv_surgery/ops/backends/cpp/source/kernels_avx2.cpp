#include "standard_library.h"

// Not a flag of the compiler: what the standard library's headers define is compiled for every x86 processor, since the
// linker keeps one copy for all files.
#pragma GCC target("avx2,fma")
#define CONDCONV_AVX512 0

#include "all_kernels.h"

namespace condconv {
extern const Kernels AVX2_KERNELS = ALL_KERNELS;
}
