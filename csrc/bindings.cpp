// The only file that knows torch: checks tensors, allocates outputs, and hands plain pointers to the kernels.
// Schemas and their documentation live in resnet_fused/ops/. Built on the stable ABI, so that one binary
// serves torch >= 2.10.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/parallel.h"
#include "kernels.h"

namespace resnet_fused {

namespace cpu {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace cpu

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, op, ": activations must be float32, float64, bfloat16 or float16");
  }
}

ScalarType statistics_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool has_channels_last_strides(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

bool is_channels_last(const Tensor& t) {
  return has_channels_last_strides(t) && !(t.is_contiguous() && t.size(2) * t.size(3) > 1);
}

// The activation that decides the layout of all others, copied only where it is neither contiguous nor
// channels_last.
Tensor dense(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": expected a 4-D activation (N, C, H, W), got ", t.dim(), "-D");
  dtype_of(op, t);
  if (t.is_contiguous() || has_channels_last_strides(t)) return t;
  const bool channels_innermost = t.stride(1) == 1 && t.size(1) > 1;
  return torch::stable::contiguous(
      t, channels_innermost ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& y) {
  STD_TORCH_CHECK(t.is_cpu() == y.is_cpu() && t.get_device_index() == y.get_device_index(), op, ": ", name,
                  " must be on the same device as the activation");
}

void check_sizes(const char* op, const char* name, const Tensor& t, const std::array<int64_t, 4>& sizes) {
  bool same = t.dim() == 4;
  for (int64_t dim = 0; same && dim < 4; ++dim) same = t.size(dim) == sizes[dim];
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape (", sizes[0], ", ", sizes[1], ", ", sizes[2],
                  ", ", sizes[3], ")");
}

// Another activation of the op: same shape, dtype and device as y, copied to y's layout where it has another.
Tensor like(const char* op, const char* name, const Tensor& t, const Tensor& y) {
  check_sizes(op, name, t, {y.size(0), y.size(1), y.size(2), y.size(3)});
  STD_TORCH_CHECK(t.scalar_type() == y.scalar_type(), op, ": ", name, " must have the activation's dtype");
  check_same_device(op, name, t, y);
  if (is_channels_last(y)) {
    return has_channels_last_strides(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  }
  return torch::stable::contiguous(t);
}

Matrix matrix(const Tensor& y) {
  const int64_t n = y.size(0), c = y.size(1), hw = y.size(2) * y.size(3);
  if (is_channels_last(y)) return {n * hw, c, c, true};
  return {n * c, hw, c, false};
}

Image image(const Tensor& y) { return {y.size(0), y.size(1), y.size(2), y.size(3), is_channels_last(y)}; }

const void* vector(const char* op, const char* name, const Tensor& v, const Tensor& y) {
  const bool fits = v.dim() == 1 && v.size(0) == y.size(1) && v.is_contiguous();
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a contiguous vector of ", y.size(1), " channels");
  STD_TORCH_CHECK(v.scalar_type() == statistics_type(y), op, ": ", name,
                  " must be float64 for a float64 activation and float32 otherwise");
  check_same_device(op, name, v, y);
  return v.const_data_ptr();
}

const void* vector(const char* op, const char* name, const OptionalTensor& v, const Tensor& y) {
  return v ? vector(op, name, *v, y) : nullptr;
}

Norm norm(const char* op, const Tensor& y, const Tensor& mean, const Tensor& invstd,
          const OptionalTensor& weight = {}, const OptionalTensor& bias = {}) {
  return {vector(op, "mean", mean, y), vector(op, "invstd", invstd, y), vector(op, "weight", weight, y),
          vector(op, "bias", bias, y)};
}

NormSums sums(const char* op, const Tensor& y, const OptionalTensor& sum_dz,
              const OptionalTensor& sum_dz_xhat) {
  STD_TORCH_CHECK(sum_dz.has_value() == sum_dz_xhat.has_value(), op,
                  ": give both sums, or neither for frozen statistics");
  return {vector(op, "sum_dz", sum_dz, y), vector(op, "sum_dz_xhat", sum_dz_xhat, y)};
}

const uint8_t* check_mask(const char* op, const Tensor& mask, const Tensor& y) {
  const Matrix m = matrix(y);
  const bool fits = mask.dim() == 2 && mask.size(0) == m.rows && mask.size(1) == m.mask_bytes_per_row() &&
                    mask.is_contiguous() && mask.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(fits, op, ": mask must be the contiguous uint8 tensor (", m.rows, ", ",
                  m.mask_bytes_per_row(), ") that the forward pass returned");
  check_same_device(op, "mask", mask, y);
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

Tensor new_vector(const Tensor& y) { return torch::stable::new_empty(y, {y.size(1)}, statistics_type(y)); }

Tensor new_mask(const Tensor& y) {
  const Matrix m = matrix(y);
  return torch::stable::new_empty(y, {m.rows, m.mask_bytes_per_row()}, ScalarType::Byte);
}

std::array<int64_t, 4> pooled_sizes(const Tensor& y) {
  const Image shape = image(y);
  return {shape.batch, shape.channels, shape.pooled_height(), shape.pooled_width()};
}

Tensor new_pooled(const Tensor& y, ScalarType dtype) {
  const auto format = is_channels_last(y) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const auto sizes = pooled_sizes(y);
  return torch::stable::empty({sizes[0], sizes[1], sizes[2], sizes[3]}, dtype, std::nullopt, y.device(),
                              std::nullopt, format);
}

// Brings a tensor of the pooled output's shape to the layout that the kernels expect.
Tensor like_pooled(const char* op, const char* name, const Tensor& t, const Tensor& y, ScalarType dtype) {
  check_sizes(op, name, t, pooled_sizes(y));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  check_same_device(op, name, t, y);
  return torch::stable::contiguous(
      t, is_channels_last(y) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

using Reduction = bool;
constexpr Reduction kElementwise = false, kReduction = true;

// Runs the kernel of the device that y lives on.
template <class Params>
void run(void (*on_cpu)(const Params&), void (*on_cuda)(const Params&, cuda::Launch), const Params& params,
         const Tensor& y, Reduction reduction) {
  if (y.is_cpu()) return on_cpu(params);
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  cuda::Launch launch{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(y.get_device_index(), &launch.stream));
  std::optional<Tensor> workspace;
  if (reduction) {
    workspace = torch::stable::new_empty(y, {cuda::reduce_workspace_bytes(matrix(y), params.dtype)},
                                         ScalarType::Byte);
    launch.workspace = workspace->mutable_data_ptr();
  }
  on_cuda(params, launch);
#else
  (void)on_cuda;
  (void)reduction;
#endif
}

#ifdef USE_CUDA
#define RUN(op, params, y, reduction) run<decltype(params)>(cpu::op, cuda::op, params, y, reduction)
#else
#define RUN(op, params, y, reduction) run<decltype(params)>(cpu::op, nullptr, params, y, reduction)
#endif

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(const Tensor& x_, double eps) {
  const char* op = "batch_norm_stats";
  const Tensor x = dense(op, x_);
  Tensor mean = new_vector(x), var = new_vector(x), invstd = new_vector(x);
  const BatchNormStats params{
      x.const_data_ptr(), mean.mutable_data_ptr(), var.mutable_data_ptr(), invstd.mutable_data_ptr(), eps,
      matrix(x),          dtype_of(op, x)};
  RUN(batch_norm_stats, params, x, kReduction);
  return {mean, var, invstd};
}

Tensor bn_relu(const Tensor& y_, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
               const OptionalTensor& bias) {
  const char* op = "bn_relu";
  const Tensor y = dense(op, y_);
  Tensor out = torch::stable::empty_like(y);
  const BnRelu params{y.const_data_ptr(), norm(op, y, mean, invstd, weight, bias), out.mutable_data_ptr(),
                      matrix(y), dtype_of(op, y)};
  RUN(bn_relu, params, y, kElementwise);
  return out;
}

std::tuple<Tensor, Tensor> bn_relu_backward_reduce(const Tensor& grad_, const Tensor& y_, const Tensor& mean,
                                                   const Tensor& invstd, const OptionalTensor& weight,
                                                   const OptionalTensor& bias) {
  const char* op = "bn_relu_backward_reduce";
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor sum_dz = new_vector(y), sum_dz_xhat = new_vector(y);
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
  const char* op = "bn_relu_backward";
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor dy = torch::stable::empty_like(y);
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

std::tuple<Tensor, Tensor> bn_add_relu(const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       const Tensor& residual_) {
  const char* op = "bn_add_relu";
  const Tensor y = dense(op, y_), residual = like(op, "residual", residual_, y);
  Tensor out = torch::stable::empty_like(y), mask = new_mask(y);
  const BnAddRelu params{
      y.const_data_ptr(),     norm(op, y, mean, invstd, weight, bias),        residual.const_data_ptr(),
      out.mutable_data_ptr(), static_cast<uint8_t*>(mask.mutable_data_ptr()), matrix(y),
      dtype_of(op, y)};
  RUN(bn_add_relu, params, y, kElementwise);
  return {out, mask};
}

std::tuple<Tensor, Tensor> bn_add_relu_backward_reduce(const Tensor& grad_, const Tensor& mask,
                                                       const Tensor& y_, const Tensor& mean,
                                                       const Tensor& invstd) {
  const char* op = "bn_add_relu_backward_reduce";
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor sum_dz = new_vector(y), sum_dz_xhat = new_vector(y);
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

std::tuple<Tensor, Tensor> bn_add_relu_backward(const Tensor& grad_, const Tensor& mask, const Tensor& y_,
                                                const Tensor& mean, const Tensor& invstd,
                                                const OptionalTensor& weight, const OptionalTensor& sum_dz,
                                                const OptionalTensor& sum_dz_xhat) {
  const char* op = "bn_add_relu_backward";
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y);
  Tensor dy = torch::stable::empty_like(y), dresidual = torch::stable::empty_like(y);
  const BnAddReluBackward params{grad.const_data_ptr(),
                                 check_mask(op, mask, y),
                                 y.const_data_ptr(),
                                 norm(op, y, mean, invstd, weight),
                                 sums(op, y, sum_dz, sum_dz_xhat),
                                 dy.mutable_data_ptr(),
                                 dresidual.mutable_data_ptr(),
                                 matrix(y),
                                 dtype_of(op, y)};
  RUN(bn_add_relu_backward, params, y, kElementwise);
  return {dy, dresidual};
}

std::tuple<Tensor, Tensor> bn_bn_add_relu(const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& skip_, const Tensor& skip_mean,
                                          const Tensor& skip_invstd, const OptionalTensor& skip_weight,
                                          const OptionalTensor& skip_bias) {
  const char* op = "bn_bn_add_relu";
  const Tensor y = dense(op, y_), skip = like(op, "skip", skip_, y);
  Tensor out = torch::stable::empty_like(y), mask = new_mask(y);
  const BnBnAddRelu params{y.const_data_ptr(),
                           norm(op, y, mean, invstd, weight, bias),
                           skip.const_data_ptr(),
                           norm(op, y, skip_mean, skip_invstd, skip_weight, skip_bias),
                           out.mutable_data_ptr(),
                           static_cast<uint8_t*>(mask.mutable_data_ptr()),
                           matrix(y),
                           dtype_of(op, y)};
  RUN(bn_bn_add_relu, params, y, kElementwise);
  return {out, mask};
}

std::tuple<Tensor, Tensor, Tensor> bn_bn_add_relu_backward_reduce(const Tensor& grad_, const Tensor& mask,
                                                                  const Tensor& y_, const Tensor& mean,
                                                                  const Tensor& invstd, const Tensor& skip_,
                                                                  const Tensor& skip_mean,
                                                                  const Tensor& skip_invstd) {
  const char* op = "bn_bn_add_relu_backward_reduce";
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y), skip = like(op, "skip", skip_, y);
  Tensor sum_dz = new_vector(y), sum_dz_xhat = new_vector(y), sum_dz_skip_xhat = new_vector(y);
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
  const char* op = "bn_bn_add_relu_backward";
  const Tensor y = dense(op, y_), grad = like(op, "grad", grad_, y), skip = like(op, "skip", skip_, y);
  Tensor dy = torch::stable::empty_like(y), dskip = torch::stable::empty_like(y);
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

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& y_, const Tensor& mean, const Tensor& invstd,
                                           const OptionalTensor& weight, const OptionalTensor& bias) {
  const char* op = "bn_relu_maxpool";
  const Tensor y = dense(op, y_);
  Tensor out = new_pooled(y, y.scalar_type()), indices = new_pooled(y, ScalarType::Byte);
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
  const char* op = "bn_relu_maxpool_backward_reduce";
  const Tensor y = dense(op, y_), grad = like_pooled(op, "grad", grad_, y, y.scalar_type()),
               indices = like_pooled(op, "indices", indices_, y, ScalarType::Byte);
  Tensor sum_dz = new_vector(y), sum_dz_xhat = new_vector(y);
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
  const char* op = "bn_relu_maxpool_backward";
  const Tensor y = dense(op, y_), grad = like_pooled(op, "grad", grad_, y, y.scalar_type()),
               indices = like_pooled(op, "indices", indices_, y, ScalarType::Byte);
  Tensor dy = torch::stable::empty_like(y);
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
  m.impl("bn_add_relu_backward_reduce", TORCH_BOX(&bn_add_relu_backward_reduce));
  m.impl("bn_add_relu_backward", TORCH_BOX(&bn_add_relu_backward));
  m.impl("bn_bn_add_relu", TORCH_BOX(&bn_bn_add_relu));
  m.impl("bn_bn_add_relu_backward_reduce", TORCH_BOX(&bn_bn_add_relu_backward_reduce));
  m.impl("bn_bn_add_relu_backward", TORCH_BOX(&bn_bn_add_relu_backward));
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

// Importing the module is what loads the library; it holds only the fact of what was built.
static PyObject* built_with_cuda(PyObject*, PyObject*) {
#ifdef USE_CUDA
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

static PyMethodDef methods[] = {
    {"built_with_cuda", built_with_cuda, METH_NOARGS, "Whether the CUDA kernels were compiled in."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
