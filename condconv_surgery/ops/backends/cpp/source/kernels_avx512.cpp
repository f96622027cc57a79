#include "standard_library.h"

// Not a flag of the compiler: see kernels_avx2.cpp. The pragma defines no macro where <immintrin.h> came before it.
#pragma GCC target("avx512f,avx512vl,fma")
#define CONDCONV_AVX512 1

#include "all_kernels.h"

static_assert(WIDEST == 16 && TALL == 8, "the widest vectors");

namespace condconv {
extern const Kernels AVX512_KERNELS = ALL_KERNELS;
}
