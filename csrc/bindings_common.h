// What every binding does: checks tensors, allocates outputs, and runs the kernel of the device they live on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>

#include "cpu/large_buffers.h"
#include "kernels.h"

namespace resnet_fused {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const char* op, const Tensor& t) {
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

inline ScalarType statistics_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_channels_last_strides(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

inline bool is_channels_last(const Tensor& t) {
  return has_channels_last_strides(t) && !(t.is_contiguous() && t.size(2) * t.size(3) > 1);
}

// The activation that decides the layout of all others, copied only where it is neither contiguous nor
// channels_last.
inline Tensor dense(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": expected a 4-D activation (N, C, H, W), got ", t.dim(), "-D");
  dtype_of(op, t);
  if (t.is_contiguous() || has_channels_last_strides(t)) return t;
  const bool channels_innermost = t.stride(1) == 1 && t.size(1) > 1;
  return torch::stable::contiguous(
      t, channels_innermost ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& y) {
  STD_TORCH_CHECK(t.is_cpu() == y.is_cpu() && t.get_device_index() == y.get_device_index(), op, ": ", name,
                  " must be on the same device as the activation");
}

inline void check_sizes(const char* op, const char* name, const Tensor& t,
                        const std::array<int64_t, 4>& sizes) {
  bool same = t.dim() == 4;
  for (int64_t dim = 0; same && dim < 4; ++dim) same = t.size(dim) == sizes[dim];
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape (", sizes[0], ", ", sizes[1], ", ", sizes[2],
                  ", ", sizes[3], ")");
}

// Another activation of the op: same shape, dtype and device as y, copied to y's layout where it has another.
inline Tensor like(const char* op, const char* name, const Tensor& t, const Tensor& y) {
  check_sizes(op, name, t, {y.size(0), y.size(1), y.size(2), y.size(3)});
  STD_TORCH_CHECK(t.scalar_type() == y.scalar_type(), op, ": ", name, " must have the activation's dtype");
  check_same_device(op, name, t, y);
  if (is_channels_last(y)) {
    return has_channels_last_strides(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  }
  return torch::stable::contiguous(t);
}

inline Matrix matrix(const Tensor& y) {
  const int64_t n = y.size(0), c = y.size(1), hw = y.size(2) * y.size(3);
  if (is_channels_last(y)) return {n * hw, c, c, true};
  return {n * c, hw, c, false};
}

inline Image image(const Tensor& y) {
  return {y.size(0), y.size(1), y.size(2), y.size(3), is_channels_last(y)};
}

inline const void* vector(const char* op, const char* name, const Tensor& v, const Tensor& y) {
  const bool fits = v.dim() == 1 && v.size(0) == y.size(1) && v.is_contiguous();
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a contiguous vector of ", y.size(1), " channels");
  STD_TORCH_CHECK(v.scalar_type() == statistics_type(y), op, ": ", name,
                  " must be float64 for a float64 activation and float32 otherwise");
  check_same_device(op, name, v, y);
  return v.const_data_ptr();
}

inline const void* vector(const char* op, const char* name, const OptionalTensor& v, const Tensor& y) {
  return v ? vector(op, name, *v, y) : nullptr;
}

inline Norm norm(const char* op, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                 const OptionalTensor& weight = {}, const OptionalTensor& bias = {}) {
  return {vector(op, "mean", mean, y), vector(op, "invstd", invstd, y), vector(op, "weight", weight, y),
          vector(op, "bias", bias, y)};
}

inline NormSums sums(const char* op, const Tensor& y, const OptionalTensor& sum_dz,
                     const OptionalTensor& sum_dz_xhat) {
  STD_TORCH_CHECK(sum_dz.has_value() == sum_dz_xhat.has_value(), op,
                  ": give both sums, or neither for frozen statistics");
  return {vector(op, "sum_dz", sum_dz, y), vector(op, "sum_dz_xhat", sum_dz_xhat, y)};
}

inline const uint8_t* check_mask(const char* op, const Tensor& mask, const Tensor& y) {
  const Matrix m = matrix(y);
  const bool fits = mask.dim() == 2 && mask.size(0) == m.rows && mask.size(1) == m.mask_bytes_per_row() &&
                    mask.is_contiguous() && mask.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(fits, op, ": mask must be the contiguous uint8 tensor (", m.rows, ", ",
                  m.mask_bytes_per_row(), ") that the forward pass returned");
  check_same_device(op, "mask", mask, y);
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

inline uint8_t* given_mask(const char* op, const Tensor& mask, const Tensor& y) {
  check_mask(op, mask, y);
  return static_cast<uint8_t*>(mask.mutable_data_ptr());
}

// An output in the caller's own memory: nothing is copied, so another layout is an error.
inline void* given_out(const char* op, const Tensor& out, const Tensor& y) {
  check_sizes(op, "out", out, {y.size(0), y.size(1), y.size(2), y.size(3)});
  STD_TORCH_CHECK(out.scalar_type() == y.scalar_type(), op, ": out must have the activation's dtype");
  check_same_device(op, "out", out, y);
  STD_TORCH_CHECK(is_channels_last(y) ? has_channels_last_strides(out) : out.is_contiguous(), op,
                  ": out must be dense, in the activation's layout");
  return out.mutable_data_ptr();
}

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
}

// An uninitialised activation on y's device, in y's layout; a large one on the CPU in memory that is used
// again.
inline Tensor new_activation(const Tensor& y, const std::array<int64_t, 4>& sizes, ScalarType dtype) {
  const auto [n, c, h, w] = sizes;
  const bool channels_last = is_channels_last(y);
  const int64_t bytes = n * c * h * w * bytes_of(dtype);
  void* buffer = nullptr;
  if (y.is_cpu() && bytes > cpu::kLargeBuffer) buffer = cpu::take_large_buffer(static_cast<size_t>(bytes));
  if (buffer == nullptr)
    return torch::stable::empty({n, c, h, w}, dtype, std::nullopt, y.device(), std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const std::array<int64_t, 4> strides = channels_last ? std::array<int64_t, 4>{h * w * c, 1, w * c, c}
                                                       : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
  return torch::stable::from_blob(buffer, {n, c, h, w}, {strides[0], strides[1], strides[2], strides[3]},
                                  y.device(), dtype, &cpu::give_large_buffer);
}

// An uninitialised activation like the dense y.
inline Tensor new_like(const Tensor& y) {
  if (y.numel() * bytes_of(y.scalar_type()) <= cpu::kLargeBuffer) return torch::stable::empty_like(y);
  return new_activation(y, {y.size(0), y.size(1), y.size(2), y.size(3)}, y.scalar_type());
}

inline Tensor new_vector(const Tensor& y) {
  return torch::stable::new_empty(y, {y.size(1)}, statistics_type(y));
}

inline Tensor new_mask(const Tensor& y) {
  const Matrix m = matrix(y);
  return torch::stable::new_empty(y, {m.rows, m.mask_bytes_per_row()}, ScalarType::Byte);
}

inline std::array<int64_t, 4> pooled_sizes(const Tensor& y) {
  const Image shape = image(y);
  return {shape.batch, shape.channels, shape.pooled_height(), shape.pooled_width()};
}

inline Tensor new_pooled(const Tensor& y, ScalarType dtype) {
  return new_activation(y, pooled_sizes(y), dtype);
}

// Brings a tensor of the pooled output's shape to the layout that the kernels expect.
inline Tensor like_pooled(const char* op, const char* name, const Tensor& t, const Tensor& y,
                          ScalarType dtype) {
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

}  // namespace resnet_fused
