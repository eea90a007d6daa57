// Kernels for processors with AVX-512 (x86-64-v4). Standard headers come before the instruction set: what
// they define is shared with other translation units.
#include "conv.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#endif
namespace resnet_fused::cpu {
namespace avx512 {
constexpr int kLanes = 16, kRows = 14, kGradRows = 8;
#include "kernels_of_isa.h"
}  // namespace avx512
ConvKernels conv_avx512() {
  return {avx512::winograd_forward, avx512::winograd_dgrad,   avx512::winograd_wgrad,
          avx512::filter_elements,  avx512::winograd_filters, avx512::winograd_inference,
          avx512::implicit_wgrad};
}
}  // namespace resnet_fused::cpu
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
