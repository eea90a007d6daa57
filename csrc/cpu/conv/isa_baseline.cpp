// Kernels for every processor the compiler was asked for: SSE2 on x86-64, NEON on aarch64.
#include "conv.h"

namespace resnet_fused::cpu {
namespace baseline {
#if defined(__aarch64__)
constexpr int kLanes = 4, kRows = 12, kGradRows = 4;
#else
constexpr int kLanes = 4, kRows = 6, kGradRows = 4;
#endif
#include "kernels_of_isa.h"
}  // namespace baseline
ConvKernels conv_baseline() {
  return {baseline::winograd_forward, baseline::winograd_dgrad,   baseline::winograd_wgrad,
          baseline::filter_elements,  baseline::winograd_filters, baseline::winograd_inference,
          baseline::implicit_wgrad};
}
}  // namespace resnet_fused::cpu
