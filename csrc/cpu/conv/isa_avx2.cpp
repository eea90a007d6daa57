// Kernels for processors with AVX2 (x86-64-v3). Standard headers come before the instruction set: what they
// define is shared with other translation units.
#include "conv.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
namespace resnet_fused::cpu {
namespace avx2 {
constexpr int kLanes = 8, kRows = 6, kGradRows = 4;
#include "kernels_of_isa.h"
}  // namespace avx2
ConvKernels conv_avx2() {
  return {avx2::winograd_forward, avx2::winograd_dgrad,     avx2::winograd_wgrad, avx2::filter_elements,
          avx2::winograd_filters, avx2::winograd_inference, avx2::implicit_wgrad};
}
}  // namespace resnet_fused::cpu
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
