// The ops as torch calls them: each hands plain pointers to its kernels. Only this file and bindings_common.h
// know torch. Schemas and their documentation live in resnet_fused/ops/. Built on the stable ABI, so that one
// binary serves torch >= 2.11.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <tuple>

#include "bindings_common.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace resnet_fused {

namespace cpu {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// torch hands on that a task has failed, but not with what.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

void parallel_for_dynamic(int64_t tasks, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(tasks, num_threads()), [&](int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) body(i);
  });
}

}  // namespace cpu

namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(const Tensor& x_, double eps) {
  Op op{"batch_norm_stats"};
  const Tensor x = dense(op, x_);
  Tensor mean = new_vector(op, x), var = new_vector(op, x), invstd = new_vector(op, x);
  const BatchNormStats params{
      x.const_data_ptr(), mean.mutable_data_ptr(), var.mutable_data_ptr(), invstd.mutable_data_ptr(), eps,
      matrix(x),          dtype_of(op, x)};
  RUN(batch_norm_stats, params, x, kReduction);
  return {mean, var, invstd};
}

Tensor bn_relu(const Tensor& y_, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
               const OptionalTensor& bias, const OptionalTensor& shift) {
  Op op{"bn_relu"};
  const Tensor y = dense(op, y_);
  Tensor out = new_like(op, y);
  const BnRelu params{y.const_data_ptr(),
                      norm(op, y, mean, invstd, weight, bias),
                      vector(op, "shift", shift, y),
                      out.mutable_data_ptr(),
                      matrix(y),
                      dtype_of(op, y)};
  RUN(bn_relu, params, y, kElementwise);
  return out;
}

std::tuple<Tensor, Tensor> bn_relu_backward_reduce(const Tensor& grad_, const Tensor& y_, const Tensor& mean,
                                                   const Tensor& invstd, const OptionalTensor& weight,
                                                   const OptionalTensor& bias) {
  Op op{"bn_relu_backward_reduce"};
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor sum_dz = new_vector(op, y), sum_dz_xhat = new_vector(op, y);
  const BnReluBackwardReduce params{grad.const_data_ptr(),
                                    y.const_data_ptr(),
                                    norm(op, y, mean, invstd, weight, bias),
                                    sum_dz.mutable_data_ptr(),
                                    sum_dz_xhat.mutable_data_ptr(),
                                    matrix(y),
                                    dtype_of(op, y)};
  RUN(bn_relu_backward_reduce, params, y, kReduction);
  return {sum_dz, sum_dz_xhat};
}

Tensor bn_relu_backward(const Tensor& grad_, const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat) {
  Op op{"bn_relu_backward"};
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor dy = new_like(op, y);
  const BnReluBackward params{grad.const_data_ptr(),
                              y.const_data_ptr(),
                              norm(op, y, mean, invstd, weight, bias),
                              sums(op, y, sum_dz, sum_dz_xhat),
                              dy.mutable_data_ptr(),
                              matrix(y),
                              dtype_of(op, y)};
  RUN(bn_relu_backward, params, y, kElementwise);
  return dy;
}

void run_bn_add_relu(Op& op, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                     const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& residual_,
                     const Tensor& out, const Tensor& mask) {
  const Tensor residual = like(op, "residual", residual_, y);
  const BnAddRelu params{y.const_data_ptr(),
                         norm(op, y, mean, invstd, weight, bias),
                         residual.const_data_ptr(),
                         given_out(op, out, y),
                         given_mask(op, mask, y),
                         matrix(y),
                         dtype_of(op, y)};
  RUN(bn_add_relu, params, y, kElementwise);
}

std::tuple<Tensor, Tensor> bn_add_relu(const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       const Tensor& residual) {
  Op op{"bn_add_relu"};
  const Tensor y = dense(op, y_);
  Tensor out = new_like(op, y), mask = new_mask(op, y);
  run_bn_add_relu(op, y, mean, invstd, weight, bias, residual, out, mask);
  return {out, mask};
}

void bn_add_relu_out(const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& residual, const Tensor& out,
                     const Tensor& mask) {
  Op op{"bn_add_relu_out"};
  run_bn_add_relu(op, dense(op, y), mean, invstd, weight, bias, residual, out, mask);
}

std::tuple<Tensor, Tensor> bn_add_relu_backward_reduce(const Tensor& grad_, const Tensor& mask,
                                                       const Tensor& y_, const Tensor& mean,
                                                       const Tensor& invstd) {
  Op op{"bn_add_relu_backward_reduce"};
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor sum_dz = new_vector(op, y), sum_dz_xhat = new_vector(op, y);
  const BnAddReluBackwardReduce params{grad.const_data_ptr(),
                                       check_mask(op, mask, y),
                                       y.const_data_ptr(),
                                       norm(op, y, mean, invstd),
                                       sum_dz.mutable_data_ptr(),
                                       sum_dz_xhat.mutable_data_ptr(),
                                       matrix(y),
                                       dtype_of(op, y)};
  RUN(bn_add_relu_backward_reduce, params, y, kReduction);
  return {sum_dz, sum_dz_xhat};
}

void run_bn_add_relu_backward(Op& op, const Tensor& grad_, const Tensor& mask, const Tensor& y,
                              const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                              const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat,
                              const Tensor& dy, void* dresidual) {
  const Tensor grad = like(op, "grad", grad_, y);
  const BnAddReluBackward params{grad.const_data_ptr(),
                                 check_mask(op, mask, y),
                                 y.const_data_ptr(),
                                 norm(op, y, mean, invstd, weight),
                                 sums(op, y, sum_dz, sum_dz_xhat),
                                 dy.mutable_data_ptr(),
                                 dresidual,
                                 matrix(y),
                                 dtype_of(op, y)};
  RUN(bn_add_relu_backward, params, y, kElementwise);
}

std::tuple<Tensor, Tensor> bn_add_relu_backward(const Tensor& grad, const Tensor& mask, const Tensor& y_,
                                                const Tensor& mean, const Tensor& invstd,
                                                const OptionalTensor& weight, const OptionalTensor& sum_dz,
                                                const OptionalTensor& sum_dz_xhat) {
  Op op{"bn_add_relu_backward"};
  const Tensor y = dense(op, y_);
  Tensor dy = new_like(op, y), dresidual = new_like(op, y);
  run_bn_add_relu_backward(op, grad, mask, y, mean, invstd, weight, sum_dz, sum_dz_xhat, dy,
                           dresidual.mutable_data_ptr());
  return {dy, dresidual};
}

Tensor bn_add_relu_backward_dy(const Tensor& grad, const Tensor& mask, const Tensor& y_, const Tensor& mean,
                               const Tensor& invstd, const OptionalTensor& weight,
                               const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat) {
  Op op{"bn_add_relu_backward_dy"};
  const Tensor y = dense(op, y_);
  Tensor dy = new_like(op, y);
  run_bn_add_relu_backward(op, grad, mask, y, mean, invstd, weight, sum_dz, sum_dz_xhat, dy, nullptr);
  return dy;
}

void run_bn_bn_add_relu(Op& op, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                        const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& skip_,
                        const Tensor& skip_mean, const Tensor& skip_invstd, const OptionalTensor& skip_weight,
                        const OptionalTensor& skip_bias, const Tensor& out, const Tensor& mask) {
  const Tensor skip = like(op, "skip", skip_, y);
  const BnBnAddRelu params{y.const_data_ptr(),
                           norm(op, y, mean, invstd, weight, bias),
                           skip.const_data_ptr(),
                           norm(op, y, skip_mean, skip_invstd, skip_weight, skip_bias),
                           given_out(op, out, y),
                           given_mask(op, mask, y),
                           matrix(y),
                           dtype_of(op, y)};
  RUN(bn_bn_add_relu, params, y, kElementwise);
}

std::tuple<Tensor, Tensor> bn_bn_add_relu(const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& skip, const Tensor& skip_mean,
                                          const Tensor& skip_invstd, const OptionalTensor& skip_weight,
                                          const OptionalTensor& skip_bias) {
  Op op{"bn_bn_add_relu"};
  const Tensor y = dense(op, y_);
  Tensor out = new_like(op, y), mask = new_mask(op, y);
  run_bn_bn_add_relu(op, y, mean, invstd, weight, bias, skip, skip_mean, skip_invstd, skip_weight, skip_bias,
                     out, mask);
  return {out, mask};
}

void bn_bn_add_relu_out(const Tensor& y, const Tensor& mean, const Tensor& invstd,
                        const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& skip,
                        const Tensor& skip_mean, const Tensor& skip_invstd, const OptionalTensor& skip_weight,
                        const OptionalTensor& skip_bias, const Tensor& out, const Tensor& mask) {
  Op op{"bn_bn_add_relu_out"};
  run_bn_bn_add_relu(op, dense(op, y), mean, invstd, weight, bias, skip, skip_mean, skip_invstd, skip_weight,
                     skip_bias, out, mask);
}

std::tuple<Tensor, Tensor, Tensor> bn_bn_add_relu_backward_reduce(const Tensor& grad_, const Tensor& mask,
                                                                  const Tensor& y_, const Tensor& mean,
                                                                  const Tensor& invstd, const Tensor& skip_,
                                                                  const Tensor& skip_mean,
                                                                  const Tensor& skip_invstd) {
  Op op{"bn_bn_add_relu_backward_reduce"};
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y), skip = like(op, "skip", skip_, y);
  Tensor sum_dz = new_vector(op, y), sum_dz_xhat = new_vector(op, y), sum_dz_skip_xhat = new_vector(op, y);
  const BnBnAddReluBackwardReduce params{grad.const_data_ptr(),
                                         check_mask(op, mask, y),
                                         y.const_data_ptr(),
                                         norm(op, y, mean, invstd),
                                         skip.const_data_ptr(),
                                         norm(op, y, skip_mean, skip_invstd),
                                         sum_dz.mutable_data_ptr(),
                                         sum_dz_xhat.mutable_data_ptr(),
                                         sum_dz_skip_xhat.mutable_data_ptr(),
                                         matrix(y),
                                         dtype_of(op, y)};
  RUN(bn_bn_add_relu_backward_reduce, params, y, kReduction);
  return {sum_dz, sum_dz_xhat, sum_dz_skip_xhat};
}

std::tuple<Tensor, Tensor> bn_bn_add_relu_backward(const Tensor& grad_, const Tensor& mask, const Tensor& y_,
                                                   const Tensor& mean, const Tensor& invstd,
                                                   const OptionalTensor& weight, const OptionalTensor& sum_dz,
                                                   const OptionalTensor& sum_dz_xhat, const Tensor& skip_,
                                                   const Tensor& skip_mean, const Tensor& skip_invstd,
                                                   const OptionalTensor& skip_weight,
                                                   const OptionalTensor& skip_sum_dz,
                                                   const OptionalTensor& sum_dz_skip_xhat) {
  Op op{"bn_bn_add_relu_backward"};
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y), skip = like(op, "skip", skip_, y);
  Tensor dy = new_like(op, y), dskip = new_like(op, y);
  const BnBnAddReluBackward params{grad.const_data_ptr(),
                                   check_mask(op, mask, y),
                                   y.const_data_ptr(),
                                   norm(op, y, mean, invstd, weight),
                                   sums(op, y, sum_dz, sum_dz_xhat),
                                   skip.const_data_ptr(),
                                   norm(op, y, skip_mean, skip_invstd, skip_weight),
                                   sums(op, y, skip_sum_dz, sum_dz_skip_xhat),
                                   dy.mutable_data_ptr(),
                                   dskip.mutable_data_ptr(),
                                   matrix(y),
                                   dtype_of(op, y)};
  RUN(bn_bn_add_relu_backward, params, y, kElementwise);
  return {dy, dskip};
}

void masked_grad(const Tensor& grad_, const Tensor& mask, const Tensor& out, bool accumulate,
                 const OptionalTensor& sum) {
  Op op{"masked_grad"};
  // The mask belongs to the layout of `out`, which is not copied.
  const Tensor y = dense(op, out), grad = like(op, "grad", grad_, y);
  double* total = nullptr;
  if (sum) {
    const bool fits = sum->dim() == 1 && sum->size(0) == y.size(1) && sum->is_contiguous() &&
                      sum->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(fits, op, ": sum must be a contiguous float64 vector of ", y.size(1), " channels");
    check_same_device(op, "sum", *sum, y);
    total = static_cast<double*>(sum->mutable_data_ptr());
  }
  const MaskedGrad params{
      grad.const_data_ptr(), check_mask(op, mask, y), given_out(op, out, y), accumulate, total, matrix(y),
      dtype_of(op, y)};
  RUN(masked_grad, params, y, total != nullptr);
}

Tensor fresh_like(const Tensor& x_, std::optional<int64_t> n, std::optional<int64_t> c,
                  std::optional<int64_t> h, std::optional<int64_t> w) {
  const Op op{"fresh_like"};
  const Tensor x = dense(op, x_);
  return new_activation(
      op, x, {n.value_or(x.size(0)), c.value_or(x.size(1)), h.value_or(x.size(2)), w.value_or(x.size(3))},
      x.scalar_type());
}

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                                           const OptionalTensor& weight, const OptionalTensor& bias) {
  Op op{"bn_relu_maxpool"};
  const Tensor y = dense(op, y_);
  Tensor out = new_pooled(op, y, y.scalar_type()), indices = new_pooled(op, y, ScalarType::Byte);
  const BnReluMaxpool params{y.const_data_ptr(),
                             norm(op, y, mean, invstd, weight, bias),
                             out.mutable_data_ptr(),
                             static_cast<uint8_t*>(indices.mutable_data_ptr()),
                             image(y),
                             dtype_of(op, y)};
  RUN(bn_relu_maxpool, params, y, kElementwise);
  return {out, indices};
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward_reduce(const Tensor& grad_, const Tensor& indices_,
                                                           const Tensor& y_, const Tensor& mean,
                                                           const Tensor& invstd) {
  Op op{"bn_relu_maxpool_backward_reduce"};
  const Tensor y = dense(op, y_), grad = like_pooled(op, "grad", grad_, y, y.scalar_type()),
               indices = like_pooled(op, "indices", indices_, y, ScalarType::Byte);
  Tensor sum_dz = new_vector(op, y), sum_dz_xhat = new_vector(op, y);
  const BnReluMaxpoolBackwardReduce params{grad.const_data_ptr(),
                                           static_cast<const uint8_t*>(indices.const_data_ptr()),
                                           y.const_data_ptr(),
                                           norm(op, y, mean, invstd),
                                           sum_dz.mutable_data_ptr(),
                                           sum_dz_xhat.mutable_data_ptr(),
                                           image(y),
                                           dtype_of(op, y)};
  RUN(bn_relu_maxpool_backward_reduce, params, y, kReduction);
  return {sum_dz, sum_dz_xhat};
}

Tensor bn_relu_maxpool_backward(const Tensor& grad_, const Tensor& indices_, const Tensor& y_,
                                const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                                const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat) {
  Op op{"bn_relu_maxpool_backward"};
  const Tensor y = dense(op, y_), grad = like_pooled(op, "grad", grad_, y, y.scalar_type()),
               indices = like_pooled(op, "indices", indices_, y, ScalarType::Byte);
  Tensor dy = new_like(op, y);
  const BnReluMaxpoolBackward params{grad.const_data_ptr(),
                                     static_cast<const uint8_t*>(indices.const_data_ptr()),
                                     y.const_data_ptr(),
                                     norm(op, y, mean, invstd, weight),
                                     sums(op, y, sum_dz, sum_dz_xhat),
                                     dy.mutable_data_ptr(),
                                     image(y),
                                     dtype_of(op, y)};
  RUN(bn_relu_maxpool_backward, params, y, kElementwise);
  return dy;
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("bn_relu", TORCH_BOX(&bn_relu));
  m.impl("bn_relu_backward_reduce", TORCH_BOX(&bn_relu_backward_reduce));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward));
  m.impl("bn_add_relu", TORCH_BOX(&bn_add_relu));
  m.impl("bn_add_relu_out", TORCH_BOX(&bn_add_relu_out));
  m.impl("bn_add_relu_backward_reduce", TORCH_BOX(&bn_add_relu_backward_reduce));
  m.impl("bn_add_relu_backward", TORCH_BOX(&bn_add_relu_backward));
  m.impl("bn_add_relu_backward_dy", TORCH_BOX(&bn_add_relu_backward_dy));
  m.impl("bn_bn_add_relu", TORCH_BOX(&bn_bn_add_relu));
  m.impl("bn_bn_add_relu_out", TORCH_BOX(&bn_bn_add_relu_out));
  m.impl("bn_bn_add_relu_backward_reduce", TORCH_BOX(&bn_bn_add_relu_backward_reduce));
  m.impl("bn_bn_add_relu_backward", TORCH_BOX(&bn_bn_add_relu_backward));
  m.impl("masked_grad", TORCH_BOX(&masked_grad));
  m.impl("fresh_like", TORCH_BOX(&fresh_like));
  m.impl("bn_relu_maxpool", TORCH_BOX(&bn_relu_maxpool));
  m.impl("bn_relu_maxpool_backward_reduce", TORCH_BOX(&bn_relu_maxpool_backward_reduce));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { resnet_fused::register_kernels(m); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { resnet_fused::register_kernels(m); }
#endif
