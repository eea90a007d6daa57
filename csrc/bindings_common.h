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
#include <new>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/large_buffers.h"
#include "kernels.h"

// The message of the error that a call of torch ended with: torch 2.13 and later have it, older ones leave
// this null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace resnet_fused {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A call of an op: its name, for errors, and copies of its operands that live until the kernel is launched.
// Hidden as torch's types are, of which it has a member.
struct __attribute__((visibility("hidden"))) Op {
  const char* name;
  std::vector<Tensor> copies{};

  const Tensor& keep(Tensor copy) { return copies.emplace_back(std::move(copy)); }
};

inline std::ostream& operator<<(std::ostream& out, const Op& op) { return out << op.name; }

// Calls allocate(), which calls torch. torch's own error only names the function that failed, so this one
// says what for: a caller that frees memory and tries again looks for "out of memory".
template <class Allocate>
Tensor allocated(const Op& op, int64_t bytes, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception& error) {
    const bool has_cause = torch_exception_get_what_without_backtrace != nullptr;
    const std::string cause = has_cause ? torch_exception_get_what_without_backtrace() : error.what();
    const auto says = [&](const char* words) { return cause.find(words) != std::string::npos; };
    if (has_cause && !says("out of memory") && !says("allocate memory"))
      throw std::runtime_error(std::string(op.name) + ": " + cause);
    throw std::runtime_error(std::string(op.name) + ": out of memory: tried to allocate " +
                             std::to_string(bytes) + " bytes. " + cause);
  }
}

// Runs a kernel, which takes memory of its own.
template <class Params>
void run_on_cpu(const Op& op, void (*kernel)(const Params&), const Params& params) {
  try {
    kernel(params);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(std::string(op.name) + ": out of memory");
  }
}

inline Dtype dtype_of(const Op& op, const Tensor& t) {
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

inline int64_t element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
}

inline int64_t bytes_of(const Tensor& t) { return t.numel() * element_bytes(t.scalar_type()); }

inline Tensor contiguous(const Op& op, const Tensor& t, MemoryFormat format = MemoryFormat::Contiguous) {
  return allocated(op, bytes_of(t), [&] { return torch::stable::contiguous(t, format); });
}

// The activation that decides the layout of all others, copied only where it is neither contiguous nor
// channels_last.
inline Tensor dense(const Op& op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": expected a 4-D activation (N, C, H, W), got ", t.dim(), "-D");
  dtype_of(op, t);
  if (t.is_contiguous() || has_channels_last_strides(t)) return t;
  const bool channels_innermost = t.stride(1) == 1 && t.size(1) > 1;
  return contiguous(op, t, channels_innermost ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void check_same_device(const Op& op, const char* name, const Tensor& t, const Tensor& y) {
  STD_TORCH_CHECK(t.is_cpu() == y.is_cpu() && t.get_device_index() == y.get_device_index(), op, ": ", name,
                  " must be on the same device as the activation");
}

inline void check_sizes(const Op& op, const char* name, const Tensor& t,
                        const std::array<int64_t, 4>& sizes) {
  bool same = t.dim() == 4;
  for (int64_t dim = 0; same && dim < 4; ++dim) same = t.size(dim) == sizes[dim];
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape (", sizes[0], ", ", sizes[1], ", ", sizes[2],
                  ", ", sizes[3], ")");
}

// Another activation of the op: same shape, dtype and device as y, copied to y's layout where it has another.
inline Tensor like(const Op& op, const char* name, const Tensor& t, const Tensor& y) {
  check_sizes(op, name, t, {y.size(0), y.size(1), y.size(2), y.size(3)});
  STD_TORCH_CHECK(t.scalar_type() == y.scalar_type(), op, ": ", name, " must have the activation's dtype");
  check_same_device(op, name, t, y);
  if (is_channels_last(y)) {
    return has_channels_last_strides(t) ? t : contiguous(op, t, MemoryFormat::ChannelsLast);
  }
  return contiguous(op, t);
}

inline Matrix matrix(const Tensor& y) {
  const int64_t n = y.size(0), c = y.size(1), hw = y.size(2) * y.size(3);
  if (is_channels_last(y)) return {n * hw, c, c, true};
  return {n * c, hw, c, false};
}

inline Image image(const Tensor& y) {
  return {y.size(0), y.size(1), y.size(2), y.size(3), is_channels_last(y)};
}

// A vector that is not contiguous is copied: those of stacked ensembles are slices.
inline const void* vector(Op& op, const char* name, const Tensor& v, const Tensor& y) {
  const bool fits = v.dim() == 1 && v.size(0) == y.size(1);
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a vector of ", y.size(1), " channels");
  STD_TORCH_CHECK(v.scalar_type() == statistics_type(y), op, ": ", name,
                  " must be float64 for a float64 activation and float32 otherwise");
  check_same_device(op, name, v, y);
  return (v.is_contiguous() ? v : op.keep(contiguous(op, v))).const_data_ptr();
}

inline const void* vector(Op& op, const char* name, const OptionalTensor& v, const Tensor& y) {
  return v ? vector(op, name, *v, y) : nullptr;
}

inline Norm norm(Op& op, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                 const OptionalTensor& weight = {}, const OptionalTensor& bias = {}) {
  return {vector(op, "mean", mean, y), vector(op, "invstd", invstd, y), vector(op, "weight", weight, y),
          vector(op, "bias", bias, y)};
}

inline NormSums sums(Op& op, const Tensor& y, const OptionalTensor& sum_dz,
                     const OptionalTensor& sum_dz_xhat) {
  STD_TORCH_CHECK(sum_dz.has_value() == sum_dz_xhat.has_value(), op,
                  ": give both sums, or neither for frozen statistics");
  return {vector(op, "sum_dz", sum_dz, y), vector(op, "sum_dz_xhat", sum_dz_xhat, y)};
}

inline const uint8_t* check_mask(const Op& op, const Tensor& mask, const Tensor& y) {
  const Matrix m = matrix(y);
  const bool fits = mask.dim() == 2 && mask.size(0) == m.rows && mask.size(1) == m.mask_bytes_per_row() &&
                    mask.is_contiguous() && mask.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(fits, op, ": mask must be the contiguous uint8 tensor (", m.rows, ", ",
                  m.mask_bytes_per_row(), ") that the forward pass returned");
  check_same_device(op, "mask", mask, y);
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

inline uint8_t* given_mask(const Op& op, const Tensor& mask, const Tensor& y) {
  check_mask(op, mask, y);
  return static_cast<uint8_t*>(mask.mutable_data_ptr());
}

// An output in the caller's own memory: nothing is copied, so another layout is an error.
inline void* given_out(const Op& op, const Tensor& out, const Tensor& y) {
  check_sizes(op, "out", out, {y.size(0), y.size(1), y.size(2), y.size(3)});
  STD_TORCH_CHECK(out.scalar_type() == y.scalar_type(), op, ": out must have the activation's dtype");
  check_same_device(op, "out", out, y);
  STD_TORCH_CHECK(is_channels_last(y) ? has_channels_last_strides(out) : out.is_contiguous(), op,
                  ": out must be dense, in the activation's layout");
  return out.mutable_data_ptr();
}

// Bytes of an activation that does not exist yet.
inline int64_t bytes_of(const Op& op, const std::array<int64_t, 4>& sizes, ScalarType dtype) {
  int64_t bytes = element_bytes(dtype);
  bool overflows = false;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, op, ": sizes must not be negative, got ", size);
    overflows |= __builtin_mul_overflow(bytes, size, &bytes);
  }
  STD_TORCH_CHECK(!overflows, op, ": a tensor of the sizes (", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
                  sizes[3], ") has more bytes than an address counts");
  return bytes;
}

// An uninitialised activation on y's device; a large one on the CPU in memory that is used again.
inline Tensor new_dense(const Op& op, const Tensor& y, const std::array<int64_t, 4>& sizes, ScalarType dtype,
                        bool channels_last) {
  const auto [n, c, h, w] = sizes;
  const int64_t bytes = bytes_of(op, sizes, dtype);
  void* buffer = nullptr;
  if (y.is_cpu() && bytes > cpu::kLargeBuffer) buffer = cpu::take_large_buffer(static_cast<size_t>(bytes));
  if (buffer == nullptr)
    return allocated(op, bytes, [&] {
      return torch::stable::empty(sizes, dtype, std::nullopt, y.device(), std::nullopt,
                                  channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    });
  const std::array<int64_t, 4> strides = channels_last ? std::array<int64_t, 4>{h * w * c, 1, w * c, c}
                                                       : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
  return torch::stable::from_blob(buffer, {n, c, h, w}, {strides[0], strides[1], strides[2], strides[3]},
                                  y.device(), dtype, &cpu::give_large_buffer);
}

// In y's layout.
inline Tensor new_activation(const Op& op, const Tensor& y, const std::array<int64_t, 4>& sizes,
                             ScalarType dtype) {
  return new_dense(op, y, sizes, dtype, is_channels_last(y));
}

// An uninitialised activation of other channels, channels_last whatever the layout of x.
inline Tensor new_channels_last(const Op& op, const Tensor& x, int64_t channels) {
  return new_dense(op, x, {x.size(0), channels, x.size(2), x.size(3)}, x.scalar_type(), true);
}

// An uninitialised activation like the dense y.
inline Tensor new_like(const Op& op, const Tensor& y) {
  const int64_t bytes = bytes_of(y);
  if (bytes <= cpu::kLargeBuffer) return allocated(op, bytes, [&] { return torch::stable::empty_like(y); });
  return new_activation(op, y, {y.size(0), y.size(1), y.size(2), y.size(3)}, y.scalar_type());
}

inline Tensor new_vector(const Op& op, const Tensor& y) {
  const ScalarType dtype = statistics_type(y);
  return allocated(op, y.size(1) * element_bytes(dtype),
                   [&] { return torch::stable::new_empty(y, {y.size(1)}, dtype); });
}

inline Tensor new_mask(const Op& op, const Tensor& y) {
  const Matrix m = matrix(y);
  return allocated(op, m.rows * m.mask_bytes_per_row(), [&] {
    return torch::stable::new_empty(y, {m.rows, m.mask_bytes_per_row()}, ScalarType::Byte);
  });
}

inline std::array<int64_t, 4> pooled_sizes(const Tensor& y) {
  const Image shape = image(y);
  return {shape.batch, shape.channels, shape.pooled_height(), shape.pooled_width()};
}

inline Tensor new_pooled(const Op& op, const Tensor& y, ScalarType dtype) {
  return new_activation(op, y, pooled_sizes(y), dtype);
}

// Brings a tensor of the pooled output's shape to the layout that the kernels expect.
inline Tensor like_pooled(const Op& op, const char* name, const Tensor& t, const Tensor& y,
                          ScalarType dtype) {
  check_sizes(op, name, t, pooled_sizes(y));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  check_same_device(op, name, t, y);
  return contiguous(op, t, is_channels_last(y) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

using Reduction = bool;
constexpr Reduction kElementwise = false, kReduction = true;

// Runs the kernel of the device that y lives on.
template <class Params>
void run(const Op& op, void (*on_cpu)(const Params&), void (*on_cuda)(const Params&, cuda::Launch),
         const Params& params, const Tensor& y, Reduction reduction) {
  if (y.is_cpu()) return run_on_cpu(op, on_cpu, params);
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  cuda::Launch launch{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(y.get_device_index(), &launch.stream));
  std::optional<Tensor> workspace;
  if (reduction) {
    const int64_t bytes = cuda::reduce_workspace_bytes(matrix(y), params.dtype);
    workspace = allocated(op, bytes, [&] { return torch::stable::new_empty(y, {bytes}, ScalarType::Byte); });
    launch.workspace = workspace->mutable_data_ptr();
  }
  on_cuda(params, launch);
#else
  (void)op;
  (void)on_cuda;
  (void)reduction;
#endif
}

#ifdef USE_CUDA
#define RUN(kernel, params, y, reduction) \
  run<decltype(params)>(op, cpu::kernel, cuda::kernel, params, y, reduction)
#else
#define RUN(kernel, params, y, reduction) \
  run<decltype(params)>(op, cpu::kernel, nullptr, params, y, reduction)
#endif

}  // namespace resnet_fused
