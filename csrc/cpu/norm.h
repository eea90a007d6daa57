// Per-channel vectors of a kernel, computed once a call so that the inner loops are a few multiply-adds.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels.h"

namespace resnet_fused::cpu {

// `count` vectors of `channels` values each, every one of them padded with zeros to a multiple of `lanes`.
template <class S>
class Vectors {
 public:
  Vectors(int count, int64_t channels, int64_t lanes = 1)
      : count_(count),
        channels_(channels),
        stride_((channels + lanes - 1) / lanes * lanes),
        values_(count * stride_) {}
  int count() const { return count_; }
  int64_t channels() const { return channels_; }
  S* operator[](int k) { return values_.data() + k * stride_; }
  const S* operator[](int k) const { return values_.data() + k * stride_; }

 private:
  int count_;
  int64_t channels_, stride_;
  std::vector<S> values_;
};

template <class S>
void fill_mean(const Norm& norm, Vectors<S>& vectors, int k) {
  const S* mean = static_cast<const S*>(norm.mean);
  for (int64_t c = 0; c < vectors.channels(); c++) vectors[k][c] = mean[c];
}

template <class S>
void fill_scale(const Norm& norm, Vectors<S>& vectors, int k) {
  const S* invstd = static_cast<const S*>(norm.invstd);
  const S* weight = static_cast<const S*>(norm.weight);
  for (int64_t c = 0; c < vectors.channels(); c++) vectors[k][c] = weight ? invstd[c] * weight[c] : invstd[c];
}

template <class S>
void fill_bias(const Norm& norm, Vectors<S>& vectors, int k) {
  const S* bias = static_cast<const S*>(norm.bias);
  for (int64_t c = 0; c < vectors.channels(); c++) vectors[k][c] = bias ? bias[c] : S(0);
}

// The vectors k, k+1 and k+2: mean, scale and bias of z = (y - mean) * scale + bias.
template <class S>
void fill_affine(const Norm& norm, Vectors<S>& vectors, int k) {
  fill_mean(norm, vectors, k);
  fill_scale(norm, vectors, k + 1);
  fill_bias(norm, vectors, k + 2);
}

// The vectors k and k+1: slope and offset of dy = scale * (dz + ((y - mean) * slope + offset)). What cancels
// is added before it is scaled, so that the scale's own rounding stays relative to the result. Without sums
// they are zero and not to be used: y may be infinite.
template <class S>
void fill_backward(const Norm& norm, const NormSums& sums, int64_t pixels, Vectors<S>& vectors, int k) {
  const S* invstd = static_cast<const S*>(norm.invstd);
  const S* sum_dz = static_cast<const S*>(sums.sum_dz);
  const S* sum_dz_xhat = static_cast<const S*>(sums.sum_dz_xhat);
  if (sum_dz == nullptr || sum_dz_xhat == nullptr) return;
  for (int64_t c = 0; c < vectors.channels(); c++) {
    vectors[k][c] = S(-double(invstd[c]) * double(sum_dz_xhat[c]) / double(pixels));
    vectors[k + 1][c] = S(-double(sum_dz[c]) / double(pixels));
  }
}

inline bool has_sums(const NormSums& sums) { return sums.sum_dz != nullptr && sums.sum_dz_xhat != nullptr; }

}  // namespace resnet_fused::cpu
