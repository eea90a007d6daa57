// The arithmetic of batch norm on one element, shared by all ops so that a forward and its backward agree
// to the last bit on where the ReLU is active.
#pragma once

#include "elements.cuh"

namespace resnet_fused::cuda {

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// NaN passes, as it does in PyTorch.
template <typename S>
__device__ inline bool relu_is_active(S z) {
  return !(z <= S(0));
}

template <typename S>
struct Affine {
  S mean, scale, bias;

  __device__ S operator()(S y) const { return multiply_add(y - mean, scale, bias); }
};

template <typename S>
struct NormVectors {
  const S *mean, *invstd, *weight, *bias;

  explicit NormVectors(const Norm& norm)
      : mean(static_cast<const S*>(norm.mean)),
        invstd(static_cast<const S*>(norm.invstd)),
        weight(static_cast<const S*>(norm.weight)),
        bias(static_cast<const S*>(norm.bias)) {}

  __device__ S scale(int64_t c) const {
    const S s = __ldg(invstd + c);
    return weight == nullptr ? s : s * __ldg(weight + c);
  }
  __device__ Affine<S> affine(int64_t c) const {
    return {__ldg(mean + c), scale(c), bias == nullptr ? S(0) : __ldg(bias + c)};
  }
};

// dy = scale * (dz + ((y - mean) * slope + offset)). What cancels is added before it is scaled, so that the
// scale's own rounding stays relative to the result.
template <typename S>
struct GradientCoefficients {
  S mean, scale, slope, offset;
};

template <typename S>
struct GradientVectors {
  NormVectors<S> norm;
  const S *sum_dz, *sum_dz_xhat;
  S inverse_pixels;

  GradientVectors(const Norm& norm, const NormSums& sums, int64_t pixels)
      : norm(norm),
        sum_dz(static_cast<const S*>(sums.sum_dz)),
        sum_dz_xhat(static_cast<const S*>(sums.sum_dz_xhat)),
        inverse_pixels(static_cast<S>(1.0 / static_cast<double>(pixels))) {}

  __device__ bool batch_statistics() const { return sum_dz != nullptr; }
  __device__ GradientCoefficients<S> coefficients(int64_t c) const {
    GradientCoefficients<S> k{__ldg(norm.mean + c), norm.scale(c), S(0), S(0)};
    if (batch_statistics()) {
      k.slope = -__ldg(norm.invstd + c) * (__ldg(sum_dz_xhat + c) * inverse_pixels);
      k.offset = -__ldg(sum_dz + c) * inverse_pixels;
    }
    return k;
  }
  // Frozen statistics must not touch y: an infinite y times a slope of zero would be NaN.
  __device__ S operator()(const GradientCoefficients<S>& k, S dz, S y) const {
    return k.scale * (batch_statistics() ? dz + multiply_add(y - k.mean, k.slope, k.offset) : dz);
  }
};

}  // namespace resnet_fused::cuda
