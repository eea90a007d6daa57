// What the tests call through ctypes: an op by name, its pointers in the order of the schema (inputs, then
// outputs, null for None and false), and the sizes of y.
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

using namespace resnet_fused;

namespace {

struct Call {
  void** p;
  const int64_t* size;  // N, C, H, W
  bool channels_last;
  Dtype dtype;

  Matrix matrix() const {
    const int64_t pixels = size[0] * size[2] * size[3];
    return channels_last ? Matrix{pixels, size[1], size[1], true}
                         : Matrix{size[0] * size[1], size[2] * size[3], size[1], false};
  }
  Image image() const { return {size[0], size[1], size[2], size[3], channels_last}; }
  Norm norm(int i) const { return {p[i], p[i + 1], p[i + 2], p[i + 3]}; }
  Norm statistics(int i) const { return {p[i], p[i + 1], nullptr, nullptr}; }
  Norm without_bias(int i) const { return {p[i], p[i + 1], p[i + 2], nullptr}; }
  uint8_t* bytes(int i) const { return static_cast<uint8_t*>(p[i]); }
};

void run(const std::string& op, const Call& c, double eps, cuda::Launch launch) {
  using namespace cuda;
  void** p = c.p;
  const Matrix m = c.matrix();
  const Image image = c.image();
  const Dtype t = c.dtype;
  if (op == "batch_norm_stats") return batch_norm_stats({p[0], p[1], p[2], p[3], eps, m, t}, launch);
  if (op == "bn_relu") return bn_relu({p[0], c.norm(1), p[5], p[6], m, t}, launch);
  if (op == "bn_relu_backward_reduce") {
    return bn_relu_backward_reduce({p[0], p[1], c.norm(2), p[6], p[7], m, t}, launch);
  }
  if (op == "bn_relu_backward")
    return bn_relu_backward({p[0], p[1], c.norm(2), {p[6], p[7]}, p[8], m, t}, launch);
  if (op == "bn_add_relu") return bn_add_relu({p[0], c.norm(1), p[5], p[6], c.bytes(7), m, t}, launch);
  if (op == "bn_add_relu_backward_reduce") {
    return bn_add_relu_backward_reduce({p[0], c.bytes(1), p[2], c.statistics(3), p[5], p[6], m, t}, launch);
  }
  if (op == "bn_add_relu_backward") {
    return bn_add_relu_backward({p[0], c.bytes(1), p[2], c.without_bias(3), {p[6], p[7]}, p[8], p[9], m, t},
                                launch);
  }
  if (op == "bn_add_relu_backward_dy") {
    return bn_add_relu_backward(
        {p[0], c.bytes(1), p[2], c.without_bias(3), {p[6], p[7]}, p[8], nullptr, m, t}, launch);
  }
  if (op == "masked_grad") {
    return masked_grad({p[0], c.bytes(1), p[2], p[3] != nullptr, static_cast<double*>(p[4]), m, t}, launch);
  }
  if (op == "bn_bn_add_relu") {
    return bn_bn_add_relu({p[0], c.norm(1), p[5], c.norm(6), p[10], c.bytes(11), m, t}, launch);
  }
  if (op == "bn_bn_add_relu_backward_reduce") {
    return bn_bn_add_relu_backward_reduce(
        {p[0], c.bytes(1), p[2], c.statistics(3), p[5], c.statistics(6), p[8], p[9], p[10], m, t}, launch);
  }
  if (op == "bn_bn_add_relu_backward") {
    return bn_bn_add_relu_backward({p[0],
                                    c.bytes(1),
                                    p[2],
                                    c.without_bias(3),
                                    {p[6], p[7]},
                                    p[8],
                                    c.without_bias(9),
                                    {p[12], p[13]},
                                    p[14],
                                    p[15],
                                    m,
                                    t},
                                   launch);
  }
  if (op == "bn_relu_maxpool") return bn_relu_maxpool({p[0], c.norm(1), p[5], c.bytes(6), image, t}, launch);
  if (op == "bn_relu_maxpool_backward_reduce") {
    return bn_relu_maxpool_backward_reduce({p[0], c.bytes(1), p[2], c.statistics(3), p[5], p[6], image, t},
                                           launch);
  }
  if (op == "bn_relu_maxpool_backward") {
    return bn_relu_maxpool_backward({p[0], c.bytes(1), p[2], c.without_bias(3), {p[6], p[7]}, p[8], image, t},
                                    launch);
  }
  throw std::runtime_error("no such op: " + op);
}

}  // namespace

extern "C" int64_t workspace_bytes(const int64_t* size, int channels_last, int dtype) {
  const Call call{nullptr, size, channels_last != 0, static_cast<Dtype>(dtype)};
  return cuda::reduce_workspace_bytes(call.matrix(), call.dtype);
}

// Null, or what went wrong.
extern "C" const char* call(const char* op, void** pointers, const int64_t* size, int channels_last,
                            int dtype, double eps, void* workspace) {
  static std::string error;
  try {
    run(op, {pointers, size, channels_last != 0, static_cast<Dtype>(dtype)}, eps, {nullptr, workspace});
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
