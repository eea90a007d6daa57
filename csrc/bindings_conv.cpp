// The convolutions as torch calls them; CPU, float32 and channels_last alone. ops/conv3x3.py and
// ops/conv_wgrad.py say when they run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bindings_common.h"
#include "kernels.h"

namespace resnet_fused {
namespace {

// An activation as the kernels read it; the first one of an op decides nothing, since all have one layout.
Tensor channels_last(const Op& op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.is_cpu(), op, ": ", name,
                  " must be a 4-D float32 tensor on the CPU");
  return has_channels_last_strides(t) ? t : contiguous(op, t, MemoryFormat::ChannelsLast);
}

Weight3x3 weight_of(const Op& op, const Tensor& weight, int64_t outputs, int64_t inputs) {
  check_sizes(op, "weight", weight, {outputs, inputs, 3, 3});
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_cpu(), op,
                  ": weight must be float32, on the CPU");
  return {static_cast<const float*>(weight.const_data_ptr()),
          {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
}

Norm optional_norm(Op& op, const Tensor& y, const OptionalTensor& mean, const OptionalTensor& invstd,
                   const OptionalTensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(mean.has_value() == invstd.has_value(), op, ": give both mean and invstd, or neither");
  return {vector(op, "mean", mean, y), vector(op, "invstd", invstd, y), vector(op, "weight", weight, y),
          vector(op, "bias", bias, y)};
}

Tensor new_floats(const Op& op, const Tensor& x, int64_t count) {
  return allocated(op, 4 * count, [&] { return torch::stable::new_empty(x, {count}, ScalarType::Float); });
}

// One row of bits for each pixel.
const uint8_t* mask_of(const Op& op, const char* name, const OptionalTensor& mask, const Tensor& y) {
  if (!mask) return nullptr;
  const int64_t pixels = y.size(0) * y.size(2) * y.size(3), bytes = (y.size(1) + 7) / 8;
  const bool fits = mask->dim() == 2 && mask->size(0) == pixels && mask->size(1) == bytes &&
                    mask->is_contiguous() && mask->scalar_type() == ScalarType::Byte && mask->is_cpu();
  STD_TORCH_CHECK(fits, op, ": ", name, " must be the contiguous uint8 tensor (", pixels, ", ", bytes,
                  ") that the forward pass returned");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv3x3_forward(const Tensor& x_, const OptionalTensor& mean,
                                                           const OptionalTensor& invstd,
                                                           const OptionalTensor& gamma,
                                                           const OptionalTensor& beta, const Tensor& weight,
                                                           double eps, bool training) {
  Op op{"conv3x3_forward"};
  const Tensor x = channels_last(op, "x", x_);
  const int64_t outputs = weight.size(0);
  Tensor y = new_channels_last(op, x, outputs);
  const int64_t count = training ? outputs : 0;
  Tensor y_mean = new_floats(op, x, count), y_var = new_floats(op, x, count),
         y_invstd = new_floats(op, x, count);
  const Conv3x3Forward params{{x.const_data_ptr(), optional_norm(op, x, mean, invstd, gamma, beta)},
                              weight_of(op, weight, outputs, x.size(1)),
                              y.mutable_data_ptr(),
                              training ? y_mean.mutable_data_ptr() : nullptr,
                              y_var.mutable_data_ptr(),
                              y_invstd.mutable_data_ptr(),
                              eps,
                              image(x),
                              outputs};
  run_on_cpu(op, cpu::conv3x3_forward, params);
  return {y, y_mean, y_var, y_invstd};
}

LazyGradient gradient_of(Op& op, const Tensor& g, const OptionalTensor& mask, const std::optional<Tensor>& y,
                         const OptionalTensor& mean, const OptionalTensor& invstd,
                         const OptionalTensor& gamma, const OptionalTensor& beta,
                         const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat) {
  STD_TORCH_CHECK(!mean || y, op, ": a gradient with the statistics of a batch norm needs its input y");
  return {g.const_data_ptr(), mask_of(op, "mask", mask, g), y ? y->const_data_ptr() : nullptr,
          optional_norm(op, g, mean, invstd, gamma, beta), sums(op, g, sum_dz, sum_dz_xhat)};
}

OptionalTensor optional_like(const Op& op, const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  return channels_last(op, name, like(op, name, *t, x));
}

std::tuple<Tensor, Tensor, Tensor> conv3x3_dgrad(
    const Tensor& g_, const OptionalTensor& mask, const OptionalTensor& y_, const OptionalTensor& mean,
    const OptionalTensor& invstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat, const Tensor& weight, const Tensor& x_,
    const OptionalTensor& x_mean, const OptionalTensor& x_invstd, const OptionalTensor& x_gamma,
    const OptionalTensor& x_beta, const OptionalTensor& residual_, const OptionalTensor& residual_mask) {
  Op op{"conv3x3_dgrad"};
  const Tensor x = channels_last(op, "x", x_), g = channels_last(op, "g", g_);
  check_sizes(op, "g", g, {x.size(0), g.size(1), x.size(2), x.size(3)});
  const OptionalTensor y = optional_like(op, "y", y_, g);
  const OptionalTensor residual = optional_like(op, "residual", residual_, x);
  Tensor da = new_channels_last(op, x, x.size(1));
  const int64_t count = x_mean ? x.size(1) : 0;
  Tensor da_sum = new_floats(op, x, count), da_sum_xhat = new_floats(op, x, count);
  const Conv3x3Dgrad params{gradient_of(op, g, mask, y, mean, invstd, gamma, beta, sum_dz, sum_dz_xhat),
                            weight_of(op, weight, g.size(1), x.size(1)),
                            {x.const_data_ptr(), optional_norm(op, x, x_mean, x_invstd, x_gamma, x_beta)},
                            residual ? residual->const_data_ptr() : nullptr,
                            mask_of(op, "residual_mask", residual_mask, x),
                            da.mutable_data_ptr(),
                            da_sum.mutable_data_ptr(),
                            da_sum_xhat.mutable_data_ptr(),
                            image(x),
                            g.size(1)};
  run_on_cpu(op, cpu::conv3x3_dgrad, params);
  return {da, da_sum, da_sum_xhat};
}

Tensor new_dweight(const Op& op, const Tensor& x, const std::array<int64_t, 4>& sizes) {
  return allocated(op, bytes_of(op, sizes, ScalarType::Float), [&] {
    return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, x.device(), std::nullopt,
                                MemoryFormat::ChannelsLast);
  });
}

Tensor conv3x3_wgrad(const Tensor& g_, const OptionalTensor& mask, const OptionalTensor& y_,
                     const OptionalTensor& mean, const OptionalTensor& invstd, const OptionalTensor& gamma,
                     const OptionalTensor& beta, const OptionalTensor& sum_dz,
                     const OptionalTensor& sum_dz_xhat, const Tensor& x_, const OptionalTensor& x_mean,
                     const OptionalTensor& x_invstd, const OptionalTensor& x_gamma,
                     const OptionalTensor& x_beta) {
  Op op{"conv3x3_wgrad"};
  const Tensor x = channels_last(op, "x", x_), g = channels_last(op, "g", g_);
  check_sizes(op, "g", g, {x.size(0), g.size(1), x.size(2), x.size(3)});
  const OptionalTensor y = optional_like(op, "y", y_, g);
  Tensor dweight = new_dweight(op, x, {g.size(1), x.size(1), 3, 3});
  const Conv3x3Wgrad params{gradient_of(op, g, mask, y, mean, invstd, gamma, beta, sum_dz, sum_dz_xhat),
                            {x.const_data_ptr(), optional_norm(op, x, x_mean, x_invstd, x_gamma, x_beta)},
                            dweight.mutable_data_ptr(),
                            image(x),
                            g.size(1)};
  run_on_cpu(op, cpu::conv3x3_wgrad, params);
  return dweight;
}

std::tuple<Tensor, Tensor> conv_wgrad(const Tensor& g_, const OptionalTensor& mask, const OptionalTensor& y_,
                                      const OptionalTensor& mean, const OptionalTensor& invstd,
                                      const OptionalTensor& gamma, const OptionalTensor& beta,
                                      const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat,
                                      const Tensor& x_, const OptionalTensor& x_mean,
                                      const OptionalTensor& x_invstd, const OptionalTensor& x_gamma,
                                      const OptionalTensor& x_beta, std::vector<int64_t> kernel,
                                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                                      std::vector<int64_t> dilation, bool sum) {
  Op op{"conv_wgrad"};
  const Tensor x = channels_last(op, "x", x_), g = channels_last(op, "g", g_);
  for (const auto* pair : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, op, ": kernel, stride, padding and dilation have two numbers each");
  std::array<int64_t, 4> expected{x.size(0), g.size(1), 0, 0};
  for (int i = 0; i < 2; i++) {
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, op,
                    ": kernel, stride and dilation must be positive, padding not negative");
    const int64_t last = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    expected[2 + i] = last < 0 ? 0 : last / stride[i] + 1;
  }
  check_sizes(op, "g", g, expected);
  const OptionalTensor y = optional_like(op, "y", y_, g);
  const std::array<int64_t, 4> sizes{g.size(1), x.size(1), kernel[0], kernel[1]};
  Tensor dweight = new_dweight(op, x, sizes), sum_dy = new_floats(op, x, sum ? g.size(1) : 0);
  const ConvWgrad params{gradient_of(op, g, mask, y, mean, invstd, gamma, beta, sum_dz, sum_dz_xhat),
                         {x.const_data_ptr(), optional_norm(op, x, x_mean, x_invstd, x_gamma, x_beta)},
                         dweight.mutable_data_ptr(),
                         sum ? sum_dy.mutable_data_ptr() : nullptr,
                         image(x),
                         g.size(1),
                         g.size(2),
                         g.size(3),
                         {kernel[0], kernel[1]},
                         {stride[0], stride[1]},
                         {padding[0], padding[1]},
                         {dilation[0], dilation[1]}};
  run_on_cpu(op, cpu::conv_wgrad, params);
  return {dweight, sum_dy};
}

Tensor conv3x3_filters(const Tensor& weight) {
  Op op{"conv3x3_filters"};
  STD_TORCH_CHECK(weight.dim() == 4, op, ": weight must be 4-D");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Weight3x3 from = weight_of(op, weight, outputs, inputs);
  Tensor filters = new_floats(op, weight, cpu::conv3x3_filter_elements(inputs, outputs));
  const Conv3x3Filters params{from, filters.mutable_data_ptr(), inputs, outputs};
  run_on_cpu(op, cpu::conv3x3_filters, params);
  return filters;
}

Tensor conv3x3_inference(const Tensor& x_, const Tensor& filters, const Tensor& bias,
                         const OptionalTensor& residual_) {
  Op op{"conv3x3_inference"};
  const Tensor x = channels_last(op, "x", x_);
  const int64_t outputs = bias.size(0);
  for (const Tensor& t : {filters, bias})
    STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Float && t.is_cpu() && t.is_contiguous(),
                    op, ": filters and bias must be contiguous float32 vectors on the CPU");
  STD_TORCH_CHECK(filters.size(0) == cpu::conv3x3_filter_elements(x.size(1), outputs), op,
                  ": filters must be those of a weight (", outputs, ", ", x.size(1), ", 3, 3)");
  Tensor out = new_channels_last(op, x, outputs);
  const OptionalTensor residual = optional_like(op, "residual", residual_, out);
  const Conv3x3Inference params{x.const_data_ptr(),
                                filters.const_data_ptr(),
                                bias.const_data_ptr(),
                                residual ? residual->const_data_ptr() : nullptr,
                                out.mutable_data_ptr(),
                                image(x),
                                outputs};
  run_on_cpu(op, cpu::conv3x3_inference, params);
  return out;
}

}  // namespace
}  // namespace resnet_fused

// No fakes and no references: the ops of ops/conv_bn.py call them, which have both.
STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "conv3x3_forward(Tensor x, Tensor? mean, Tensor? invstd, Tensor? gamma, Tensor? beta, Tensor weight,"
      " float eps, bool training) -> (Tensor y, Tensor mean_y, Tensor var_y, Tensor invstd_y)");
  m.def(
      "conv3x3_dgrad(Tensor g, Tensor? mask, Tensor? y, Tensor? mean, Tensor? invstd, Tensor? gamma,"
      " Tensor? beta, Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor weight, Tensor x, Tensor? x_mean,"
      " Tensor? x_invstd, Tensor? x_gamma, Tensor? x_beta, Tensor? residual, Tensor? residual_mask)"
      " -> (Tensor da, Tensor da_sum_dz, Tensor da_sum_dz_xhat)");
  m.def(
      "conv3x3_wgrad(Tensor g, Tensor? mask, Tensor? y, Tensor? mean, Tensor? invstd, Tensor? gamma,"
      " Tensor? beta, Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor x, Tensor? x_mean, Tensor? x_invstd,"
      " Tensor? x_gamma, Tensor? x_beta) -> Tensor");
  m.def(
      "conv_wgrad(Tensor g, Tensor? mask, Tensor? y, Tensor? mean, Tensor? invstd, Tensor? gamma,"
      " Tensor? beta, Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor x, Tensor? x_mean, Tensor? x_invstd,"
      " Tensor? x_gamma, Tensor? x_beta, int[] kernel, int[] stride, int[] padding, int[] dilation, bool sum)"
      " -> (Tensor dweight, Tensor sum_dy)");
  m.def("conv3x3_filters(Tensor weight) -> Tensor");
  m.def("conv3x3_inference(Tensor x, Tensor filters, Tensor bias, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&resnet_fused::conv3x3_forward));
  m.impl("conv3x3_dgrad", TORCH_BOX(&resnet_fused::conv3x3_dgrad));
  m.impl("conv3x3_wgrad", TORCH_BOX(&resnet_fused::conv3x3_wgrad));
  m.impl("conv_wgrad", TORCH_BOX(&resnet_fused::conv_wgrad));
  m.impl("conv3x3_filters", TORCH_BOX(&resnet_fused::conv3x3_filters));
  m.impl("conv3x3_inference", TORCH_BOX(&resnet_fused::conv3x3_inference));
}
