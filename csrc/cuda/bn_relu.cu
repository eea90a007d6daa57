// relu(bn(y)), and its backward, which recomputes from y where the ReLU is active.
#include "elementwise.cuh"
#include "reduce.cuh"

namespace resnet_fused::cuda {
namespace {

template <typename T>
struct Forward {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = Affine<S>;
  static constexpr int kInputs = 1, kOutputs = 1;
  static constexpr bool kReadsMask = false, kWritesMask = false;

  const T* inputs[1];  // y
  T* outputs[1];       // out
  NormVectors<S> norm;

  __device__ Coefficients coefficients(int64_t c) const { return norm.affine(c); }
  __device__ bool apply(const Coefficients& affine, const S (&in)[1], bool, S (&out)[1]) const {
    const S z = affine(in[0]);
    const bool is_active = relu_is_active(z);
    out[0] = is_active ? z : S(0);
    return is_active;
  }
};

template <typename T>
struct ShiftedForward {
  using Element = T;
  using S = Stat<T>;
  struct Coefficients {
    Affine<S> affine;
    S shift;
  };
  static constexpr int kInputs = 1, kOutputs = 1;
  static constexpr bool kReadsMask = false, kWritesMask = false;

  const T* inputs[1];  // y
  T* outputs[1];       // out
  NormVectors<S> norm;
  const S* shift;

  __device__ Coefficients coefficients(int64_t c) const { return {norm.affine(c), __ldg(shift + c)}; }
  __device__ bool apply(const Coefficients& k, const S (&in)[1], bool, S (&out)[1]) const {
    const S z = k.affine(in[0]);
    const bool is_active = relu_is_active(z);
    out[0] = (is_active ? z : S(0)) - k.shift;
    return is_active;
  }
};

template <typename T>
struct BackwardReduce {
  using Element = T;
  using S = Stat<T>;
  using Coefficients = Affine<S>;
  static constexpr int kInputs = 2, kSums = 2;
  static constexpr bool kReadsMask = false;

  const T* inputs[2];  // grad, y
  NormVectors<S> norm;
  Totals<S, 2> totals;

  __device__ Coefficients coefficients(int64_t c) const { return norm.affine(c); }
  __device__ void terms(const Coefficients& affine, const S (&in)[2], bool, S (&t)[2]) const {
    t[0] = relu_is_active(affine(in[1])) ? in[0] : S(0);
    t[1] = t[0] * (in[1] - affine.mean);
  }
};

template <typename T>
struct Backward {
  using Element = T;
  using S = Stat<T>;
  struct Coefficients {
    GradientCoefficients<S> gradient;
    S bias;
  };
  static constexpr int kInputs = 2, kOutputs = 1;
  static constexpr bool kReadsMask = false, kWritesMask = false;

  const T* inputs[2];  // grad, y
  T* outputs[1];       // dy
  GradientVectors<S> gradient;

  __device__ Coefficients coefficients(int64_t c) const {
    return {gradient.coefficients(c), gradient.norm.affine(c).bias};
  }
  __device__ bool apply(const Coefficients& k, const S (&in)[2], bool, S (&out)[1]) const {
    const Affine<S> affine{k.gradient.mean, k.gradient.scale, k.bias};
    out[0] = gradient(k.gradient, relu_is_active(affine(in[1])) ? in[0] : S(0), in[1]);
    return true;
  }
};

}  // namespace

void bn_relu(const BnRelu& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    const T* y = static_cast<const T*>(p.y);
    T* out = static_cast<T*>(p.out);
    const NormVectors<S> norm(p.norm);
    if (p.shift == nullptr) {
      return launch_elementwise("bn_relu", Forward<T>{{y}, {out}, norm}, p.shape, where);
    }
    const ShiftedForward<T> op{{y}, {out}, norm, static_cast<const S*>(p.shift)};
    launch_elementwise("bn_relu", op, p.shape, where);
  });
}

void bn_relu_backward_reduce(const BnReluBackwardReduce& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    const BackwardReduce<T> op{{static_cast<const T*>(p.grad), static_cast<const T*>(p.y)},
                               NormVectors<S>(p.norm),
                               {{static_cast<S*>(p.sum_dz), static_cast<S*>(p.sum_dz_xhat)},
                                {nullptr, static_cast<const S*>(p.norm.invstd)}}};
    launch_reduce("bn_relu_backward_reduce", op, p.shape, where);
  });
}

void bn_relu_backward(const BnReluBackward& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Backward<T> op{{static_cast<const T*>(p.grad), static_cast<const T*>(p.y)},
                         {static_cast<T*>(p.dy)},
                         GradientVectors<Stat<T>>(p.norm, p.sums, p.shape.pixels())};
    launch_elementwise("bn_relu_backward", op, p.shape, where);
  });
}

}  // namespace resnet_fused::cuda
