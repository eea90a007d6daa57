// What bindings.cpp hands to a kernel: plain pointers in plain structs, one struct per op.
// cpu/ and cuda/ implement the same functions on the same structs.
#pragma once

#include <cstdint>

namespace resnet_fused {

enum class Dtype { f32, f64, bf16, f16 };

// A dense activation, seen as a row-major matrix of rows x cols elements.
//   channels_last: rows = N*H*W pixels, cols = C, the channel is the column;
//   contiguous:    rows = N*C planes, cols = H*W, the channel is row % channels.
struct Matrix {
  int64_t rows, cols, channels;
  bool channels_last;

  int64_t pixels() const { return channels == 0 ? 0 : rows * cols / channels; }
  int64_t mask_bytes_per_row() const { return (cols + 7) / 8; }
};

// Batch norm as z = (y - mean) * (invstd * weight) + bias. Vectors of `channels` elements in the
// statistics type: double for f64 activations, float for all others.
struct Norm {
  const void* mean;
  const void* invstd;
  const void* weight;  // null: ones
  const void* bias;    // null: zeros
};

// Sums over the pixels of a channel, dz = gradient w.r.t. the ReLU's input, xhat = (y - mean) * invstd.
// Both null when the statistics did not come from this batch (frozen or eval batch norm); otherwise
//   dy = invstd * weight * (dz - sum_dz / pixels - xhat * sum_dz_xhat / pixels).
struct NormSums {
  const void* sum_dz;
  const void* sum_dz_xhat;
};

// mask: mask_bytes_per_row() bytes for each row; bit j of byte i stands for column 8*i+j and is set
// where the ReLU let the value through, !(z <= 0), so that NaN passes as it does in PyTorch.
// Unused bits of a row's last byte are zero.

struct BatchNormStats {
  const void* x;
  void *mean, *var, *invstd;  // var is biased; invstd = 1 / sqrt(var + eps)
  double eps;
  Matrix shape;
  Dtype dtype;
};

struct BnRelu {
  const void* y;
  Norm norm;
  const void* shift;  // subtracted after the ReLU, in the statistics type; null: nothing is
  void* out;
  Matrix shape;
  Dtype dtype;
};

struct BnReluBackwardReduce {
  const void *grad, *y;
  Norm norm;
  void *sum_dz, *sum_dz_xhat;
  Matrix shape;
  Dtype dtype;
};

struct BnReluBackward {
  const void *grad, *y;
  Norm norm;
  NormSums sums;
  void* dy;
  Matrix shape;
  Dtype dtype;
};

struct BnAddRelu {
  const void* y;
  Norm norm;
  const void* residual;
  void* out;
  uint8_t* mask;
  Matrix shape;
  Dtype dtype;
};

struct BnAddReluBackwardReduce {
  const void* grad;
  const uint8_t* mask;
  const void* y;
  Norm norm;
  void *sum_dz, *sum_dz_xhat;
  Matrix shape;
  Dtype dtype;
};

struct BnAddReluBackward {
  const void* grad;
  const uint8_t* mask;
  const void* y;
  Norm norm;
  NormSums sums;
  void *dy, *dresidual;  // dresidual null: not written
  Matrix shape;
  Dtype dtype;
};

// The downsample block: relu(bn(y) + bn(skip)).
struct BnBnAddRelu {
  const void* y;
  Norm norm;
  const void* skip;
  Norm skip_norm;
  void* out;
  uint8_t* mask;
  Matrix shape;
  Dtype dtype;
};

struct BnBnAddReluBackwardReduce {
  const void* grad;
  const uint8_t* mask;
  const void* y;
  Norm norm;
  const void* skip;
  Norm skip_norm;
  void *sum_dz, *sum_dz_xhat, *sum_dz_skip_xhat;
  Matrix shape;
  Dtype dtype;
};

struct BnBnAddReluBackward {
  const void* grad;
  const uint8_t* mask;
  const void* y;
  Norm norm;
  NormSums sums;
  const void* skip;
  Norm skip_norm;
  NormSums skip_sums;
  void *dy, *dskip;
  Matrix shape;
  Dtype dtype;
};

// dz = grad where the mask has a bit, else 0. out = dz, or out + dz; sum += dz summed over the pixels.
struct MaskedGrad {
  const void* grad;
  const uint8_t* mask;
  void* out;
  bool accumulate;
  double* sum;  // null: not asked for
  Matrix shape;
  Dtype dtype;
};

// Max-pooling of relu(bn(y)) with a 3x3 window, stride 2, padding 1.
// Output is H_out = (H+1)/2 by W_out = (W+1)/2. An index is kh*3+kw of the window's first maximum,
// or kNoGradient where that maximum is not above zero. It is the caller's in backward, so it may be any byte:
// one that names no pixel of y counts as kNoGradient.
constexpr uint8_t kNoGradient = 9;

struct Image {
  int64_t batch, channels, height, width;
  bool channels_last;

  int64_t pooled_height() const { return (height + 1) / 2; }
  int64_t pooled_width() const { return (width + 1) / 2; }
};

struct BnReluMaxpool {
  const void* y;
  Norm norm;
  void* out;
  uint8_t* indices;
  Image shape;  // of y
  Dtype dtype;
};

struct BnReluMaxpoolBackwardReduce {
  const void* grad;  // of the pooled output
  const uint8_t* indices;
  const void* y;
  Norm norm;
  void *sum_dz, *sum_dz_xhat;
  Image shape;
  Dtype dtype;
};

struct BnReluMaxpoolBackward {
  const void* grad;
  const uint8_t* indices;
  const void* y;
  Norm norm;
  NormSums sums;
  void* dy;
  Image shape;
  Dtype dtype;
};

// x, or relu(bn(x)) where the norm has a mean.
struct LazyActivation {
  const void* x;
  Norm norm;
};

// The gradient w.r.t. a convolution's output y, from g and the batch norm after it; see types.Gradient.
// Without a mean g * mask; without a mask and with a mean the mask is that of relu(bn(y)).
struct LazyGradient {
  const void* g;
  const uint8_t* mask;
  const void* y;
  Norm norm;
  NormSums sums;
};

// (outputs, inputs, 3, 3) in any layout.
struct Weight3x3 {
  const float* data;
  int64_t strides[4];
};

// 3x3 convolutions of stride 1 and padding 1 of float32 in channels_last, by Winograd's algorithm.
// y = conv(a) and its statistics.
struct Conv3x3Forward {
  LazyActivation a;
  Weight3x3 weight;
  void* y;
  void *mean, *var, *invstd;  // null: not asked for
  double eps;
  Image shape;  // of a
  int64_t outputs;
};

// da, the gradient w.r.t. a, plus the residual where there is one, and the sums of a's batch norm.
struct Conv3x3Dgrad {
  LazyGradient dy;
  Weight3x3 weight;
  LazyActivation a;
  const void* residual;
  const uint8_t* residual_mask;
  void* da;
  void *sum_dz, *sum_dz_xhat;
  Image shape;  // of a
  int64_t outputs;
};

// dweight is (outputs, 3, 3, inputs) in memory.
struct Conv3x3Wgrad {
  LazyGradient dy;
  LazyActivation a;
  void* dweight;
  Image shape;  // of a
  int64_t outputs;
};

// dweight is (outputs, kernel[0], kernel[1], inputs) in memory; sum_dy, (outputs), over the pixels.
struct ConvWgrad {
  LazyGradient dy;
  LazyActivation a;
  void* dweight;
  void* sum_dy;                    // null: not asked for
  Image shape;                     // of a
  int64_t outputs, height, width;  // of dy
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// The weight of Conv3x3Inference: transformed once, for many calls.
struct Conv3x3Filters {
  Weight3x3 weight;
  void* filters;  // conv3x3_filter_elements
  int64_t inputs, outputs;
};

// out = relu(conv(x) + bias + residual), the residual where there is one.
struct Conv3x3Inference {
  const void *x, *filters, *bias, *residual;
  void* out;
  Image shape;  // of x
  int64_t outputs;
};

namespace cpu {
// Whose instructions the convolutions use: avx512, avx2 or baseline (NEON on aarch64).
const char* cpu_isa();
int64_t conv3x3_filter_elements(int64_t inputs, int64_t outputs);
void conv3x3_filters(const Conv3x3Filters&);
void conv3x3_inference(const Conv3x3Inference&);
void conv3x3_forward(const Conv3x3Forward&);
void conv3x3_dgrad(const Conv3x3Dgrad&);
void conv3x3_wgrad(const Conv3x3Wgrad&);
void conv_wgrad(const ConvWgrad&);
void batch_norm_stats(const BatchNormStats&);
void bn_relu(const BnRelu&);
void bn_relu_backward_reduce(const BnReluBackwardReduce&);
void bn_relu_backward(const BnReluBackward&);
void bn_add_relu(const BnAddRelu&);
void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce&);
void bn_add_relu_backward(const BnAddReluBackward&);
void bn_bn_add_relu(const BnBnAddRelu&);
void bn_bn_add_relu_backward_reduce(const BnBnAddReluBackwardReduce&);
void bn_bn_add_relu_backward(const BnBnAddReluBackward&);
void masked_grad(const MaskedGrad&);
void bn_relu_maxpool(const BnReluMaxpool&);
void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce&);
void bn_relu_maxpool_backward(const BnReluMaxpoolBackward&);
}  // namespace cpu

namespace cuda {
// Where a kernel runs. Reductions leave their partial results in `workspace`: reduce_workspace_bytes()
// bytes of device memory, enough for any of the reductions over a tensor of that shape.
struct Launch {
  void* stream;  // cudaStream_t
  void* workspace;
};
int64_t reduce_workspace_bytes(const Matrix&, Dtype);

void batch_norm_stats(const BatchNormStats&, Launch);
void bn_relu(const BnRelu&, Launch);
void bn_relu_backward_reduce(const BnReluBackwardReduce&, Launch);
void bn_relu_backward(const BnReluBackward&, Launch);
void bn_add_relu(const BnAddRelu&, Launch);
void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce&, Launch);
void bn_add_relu_backward(const BnAddReluBackward&, Launch);
void bn_bn_add_relu(const BnBnAddRelu&, Launch);
void bn_bn_add_relu_backward_reduce(const BnBnAddReluBackwardReduce&, Launch);
void bn_bn_add_relu_backward(const BnBnAddReluBackward&, Launch);
void masked_grad(const MaskedGrad&, Launch);
void bn_relu_maxpool(const BnReluMaxpool&, Launch);
void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce&, Launch);
void bn_relu_maxpool_backward(const BnReluMaxpoolBackward&, Launch);
}  // namespace cuda

}  // namespace resnet_fused
