// relu(bn(y) + residual), which remembers in one bit an element where the ReLU is active.
#include "elementwise.cuh"
#include "reduce.cuh"

namespace resnet_fused::cuda {
namespace {

template <typename T>
struct Forward {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = Affine<S>;
  static constexpr int kInputs = 2, kOutputs = 1;
  static constexpr bool kReadsMask = false, kWritesMask = true;

  const T* inputs[2];  // y, residual
  T* outputs[1];       // out
  uint8_t* mask_out;
  NormVectors<S> norm;

  __device__ Coefficients coefficients(int64_t c) const { return norm.affine(c); }
  __device__ bool apply(const Coefficients& affine, const S (&in)[2], bool, S (&out)[1]) const {
    const S z = affine(in[0]) + in[1];
    const bool is_active = relu_is_active(z);
    out[0] = is_active ? z : S(0);
    return is_active;
  }
};

template <typename T>
struct BackwardReduce {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = S;  // the mean
  static constexpr int kInputs = 2, kSums = 2;
  static constexpr bool kReadsMask = true;

  const T* inputs[2];  // grad, y
  const uint8_t* mask_in;
  const S* mean;
  Totals<S, 2> totals;

  __device__ Coefficients coefficients(int64_t c) const { return __ldg(mean + c); }
  __device__ void terms(const Coefficients& mean, const S (&in)[2], bool active, S (&t)[2]) const {
    t[0] = active ? in[0] : S(0);
    t[1] = t[0] * (in[1] - mean);
  }
};

template <typename T, bool kResidual>
struct Backward {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = GradientCoefficients<S>;
  static constexpr int kInputs = 2, kOutputs = kResidual ? 2 : 1;
  static constexpr bool kReadsMask = true, kWritesMask = false;

  const T* inputs[2];    // grad, y
  T* outputs[kOutputs];  // dy, dresidual
  const uint8_t* mask_in;
  GradientVectors<S> gradient;

  __device__ Coefficients coefficients(int64_t c) const { return gradient.coefficients(c); }
  __device__ bool apply(const Coefficients& k, const S (&in)[2], bool active, S (&out)[kOutputs]) const {
    const S dz = active ? in[0] : S(0);
    out[0] = gradient(k, dz, in[1]);
    if constexpr (kResidual) out[1] = dz;
    return true;
  }
};

}  // namespace

void bn_add_relu(const BnAddRelu& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Forward<T> op{{static_cast<const T*>(p.y), static_cast<const T*>(p.residual)},
                        {static_cast<T*>(p.out)},
                        p.mask,
                        NormVectors<Stat<T>>(p.norm)};
    launch_elementwise("bn_add_relu", op, p.shape, where);
  });
}

void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    const BackwardReduce<T> op{{static_cast<const T*>(p.grad), static_cast<const T*>(p.y)},
                               p.mask,
                               static_cast<const S*>(p.norm.mean),
                               {{static_cast<S*>(p.sum_dz), static_cast<S*>(p.sum_dz_xhat)},
                                {nullptr, static_cast<const S*>(p.norm.invstd)}}};
    launch_reduce("bn_add_relu_backward_reduce", op, p.shape, where);
  });
}

void bn_add_relu_backward(const BnAddReluBackward& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T *grad = static_cast<const T*>(p.grad), *y = static_cast<const T*>(p.y);
    T *dy = static_cast<T*>(p.dy), *dresidual = static_cast<T*>(p.dresidual);
    const GradientVectors<Stat<T>> gradient(p.norm, p.sums, p.shape.pixels());
    if (dresidual == nullptr) {
      const Backward<T, false> op{{grad, y}, {dy}, p.mask, gradient};
      return launch_elementwise("bn_add_relu_backward", op, p.shape, where);
    }
    const Backward<T, true> op{{grad, y}, {dy, dresidual}, p.mask, gradient};
    launch_elementwise("bn_add_relu_backward", op, p.shape, where);
  });
}

}  // namespace resnet_fused::cuda
