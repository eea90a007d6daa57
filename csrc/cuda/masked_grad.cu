// The gradient w.r.t. a ReLU's input from its saved mask, written or added to what is there; in a second pass
// its sum.
#include "elementwise.cuh"
#include "reduce.cuh"

namespace resnet_fused::cuda {
namespace {

struct NoCoefficients {};

template <typename T, bool kAccumulate>
struct Copy {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = NoCoefficients;
  static constexpr int kInputs = kAccumulate ? 2 : 1, kOutputs = 1;
  static constexpr bool kReadsMask = true, kWritesMask = false;

  const T* inputs[kInputs];  // grad, out
  T* outputs[1];             // out: a thread reads its elements before it writes them
  const uint8_t* mask_in;

  __device__ Coefficients coefficients(int64_t) const { return {}; }
  __device__ bool apply(const Coefficients&, const S (&in)[kInputs], bool active, S (&out)[1]) const {
    out[0] = active ? in[0] : S(0);
    if constexpr (kAccumulate) out[0] += in[1];
    return true;
  }
};

template <typename T>
struct Reduce {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = NoCoefficients;
  static constexpr int kInputs = 1, kSums = 1;
  static constexpr bool kReadsMask = true;

  const T* inputs[1];  // grad
  const uint8_t* mask_in;
  RunningTotal<S> totals;

  __device__ Coefficients coefficients(int64_t) const { return {}; }
  __device__ void terms(const Coefficients&, const S (&in)[1], bool active, S (&t)[1]) const {
    t[0] = active ? in[0] : S(0);
  }
};

}  // namespace

void masked_grad(const MaskedGrad& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* grad = static_cast<const T*>(p.grad);
    T* out = static_cast<T*>(p.out);
    if (p.accumulate) {
      launch_elementwise("masked_grad", Copy<T, true>{{grad, out}, {out}, p.mask}, p.shape, where);
    } else {
      launch_elementwise("masked_grad", Copy<T, false>{{grad}, {out}, p.mask}, p.shape, where);
    }
    if (p.sum != nullptr) {
      launch_reduce("masked_grad", Reduce<T>{{grad}, p.mask, {p.sum}}, p.shape, where);
    }
  });
}

}  // namespace resnet_fused::cuda
