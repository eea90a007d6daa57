// relu(bn(y) + bn(skip)), the end of a block with a downsample branch.
#include "elementwise.cuh"
#include "reduce.cuh"

namespace resnet_fused::cuda {
namespace {

template <typename T>
struct Forward {
  using Element = T;
  using S = Stat<T>;
  struct Coefficients {
    S mean, scale, skip_mean, skip_scale, bias;  // bias: of both
  };
  static constexpr int kInputs = 2, kOutputs = 1;
  static constexpr bool kReadsMask = false, kWritesMask = true;

  const T* inputs[2];  // y, skip
  T* outputs[1];       // out
  uint8_t* mask_out;
  NormVectors<S> norm, skip_norm;

  __device__ Coefficients coefficients(int64_t c) const {
    const Affine<S> a = norm.affine(c), b = skip_norm.affine(c);
    return {a.mean, a.scale, b.mean, b.scale, a.bias + b.bias};
  }
  __device__ bool apply(const Coefficients& k, const S (&in)[2], bool, S (&out)[1]) const {
    const S z =
        multiply_add(in[0] - k.mean, k.scale, multiply_add(in[1] - k.skip_mean, k.skip_scale, k.bias));
    const bool is_active = relu_is_active(z);
    out[0] = is_active ? z : S(0);
    return is_active;
  }
};

template <typename T>
struct BackwardReduce {
  using Element = T;
  using S = Stat<T>;
  struct Coefficients {
    S mean, skip_mean;
  };
  static constexpr int kInputs = 3, kSums = 3;
  static constexpr bool kReadsMask = true;

  const T* inputs[3];  // grad, y, skip
  const uint8_t* mask_in;
  const S *mean, *skip_mean;
  Totals<S, 3> totals;

  __device__ Coefficients coefficients(int64_t c) const { return {__ldg(mean + c), __ldg(skip_mean + c)}; }
  __device__ void terms(const Coefficients& k, const S (&in)[3], bool active, S (&t)[3]) const {
    t[0] = active ? in[0] : S(0);
    t[1] = t[0] * (in[1] - k.mean);
    t[2] = t[0] * (in[2] - k.skip_mean);
  }
};

template <typename T>
struct Backward {
  using Element = T;
  using S = Stat<T>;
  struct Coefficients {
    GradientCoefficients<S> y, skip;
  };
  static constexpr int kInputs = 3, kOutputs = 2;
  static constexpr bool kReadsMask = true, kWritesMask = false;

  const T* inputs[3];  // grad, y, skip
  T* outputs[2];       // dy, dskip
  const uint8_t* mask_in;
  GradientVectors<S> gradient, skip_gradient;

  __device__ Coefficients coefficients(int64_t c) const {
    return {gradient.coefficients(c), skip_gradient.coefficients(c)};
  }
  __device__ bool apply(const Coefficients& k, const S (&in)[3], bool active, S (&out)[2]) const {
    const S dz = active ? in[0] : S(0);
    out[0] = gradient(k.y, dz, in[1]);
    out[1] = skip_gradient(k.skip, dz, in[2]);
    return true;
  }
};

}  // namespace

void bn_bn_add_relu(const BnBnAddRelu& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Forward<T> op{{static_cast<const T*>(p.y), static_cast<const T*>(p.skip)},
                        {static_cast<T*>(p.out)},
                        p.mask,
                        NormVectors<Stat<T>>(p.norm),
                        NormVectors<Stat<T>>(p.skip_norm)};
    launch_elementwise("bn_bn_add_relu", op, p.shape, where);
  });
}

void bn_bn_add_relu_backward_reduce(const BnBnAddReluBackwardReduce& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    const BackwardReduce<T> op{
        {static_cast<const T*>(p.grad), static_cast<const T*>(p.y), static_cast<const T*>(p.skip)},
        p.mask,
        static_cast<const S*>(p.norm.mean),
        static_cast<const S*>(p.skip_norm.mean),
        {{static_cast<S*>(p.sum_dz), static_cast<S*>(p.sum_dz_xhat), static_cast<S*>(p.sum_dz_skip_xhat)},
         {nullptr, static_cast<const S*>(p.norm.invstd), static_cast<const S*>(p.skip_norm.invstd)}}};
    launch_reduce("bn_bn_add_relu_backward_reduce", op, p.shape, where);
  });
}

void bn_bn_add_relu_backward(const BnBnAddReluBackward& p, Launch where) {
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    const Backward<T> op{
        {static_cast<const T*>(p.grad), static_cast<const T*>(p.y), static_cast<const T*>(p.skip)},
        {static_cast<T*>(p.dy), static_cast<T*>(p.dskip)},
        p.mask,
        GradientVectors<S>(p.norm, p.sums, p.shape.pixels()),
        GradientVectors<S>(p.skip_norm, p.skip_sums, p.shape.pixels())};
    launch_elementwise("bn_bn_add_relu_backward", op, p.shape, where);
  });
}

}  // namespace resnet_fused::cuda
