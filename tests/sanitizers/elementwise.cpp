// Calls of the ops of batch norm, ReLU, addition, masks and pooling.
#include "harness.h"

namespace harness {
namespace {

struct Shape {
  int64_t batch, channels, height, width;
  bool channels_last;
  Dtype dtype;
  bool affine, batch_statistics;

  int64_t elements() const { return batch * channels * height * width; }
  Matrix matrix() const {
    const int64_t pixels = batch * height * width;
    return channels_last ? Matrix{pixels, channels, channels, true}
                         : Matrix{batch * channels, height * width, channels, false};
  }
  Image image() const { return {batch, channels, height, width, channels_last}; }
  int64_t pooled() const { return batch * channels * image().pooled_height() * image().pooled_width(); }
};

// The operands of a call, by their roles.
struct Operands {
  Memory& memory;
  const Shape& shape;

  void* activation() { return memory.values(shape.dtype, shape.elements()); }
  void* pooled() { return memory.values(shape.dtype, shape.pooled()); }
  void* out() { return memory.result(shape.elements() * bytes_of(shape.dtype)); }
  void* pooled_out() { return memory.result(shape.pooled() * bytes_of(shape.dtype)); }
  void* vector() { return memory.values(statistics_of(shape.dtype), shape.channels); }
  void* positive_vector() { return memory.positive(statistics_of(shape.dtype), shape.channels); }
  void* vector_out() { return memory.result(shape.channels * bytes_of(statistics_of(shape.dtype))); }
  uint8_t* mask() { return memory.mask(shape.matrix().rows, shape.matrix().cols); }
  uint8_t* mask_out() {
    const Matrix m = shape.matrix();
    return static_cast<uint8_t*>(memory.result(m.rows * m.mask_bytes_per_row()));
  }
  Norm norm() {
    void *mean = vector(), *invstd = positive_vector();
    return {mean, invstd, shape.affine ? vector() : nullptr, shape.affine ? vector() : nullptr};
  }
  NormSums sums() {
    if (!shape.batch_statistics) return {nullptr, nullptr};
    void* sum_dz = vector();
    return {sum_dz, vector()};
  }
};

using Call = void (*)(Operands&);

struct Op {
  const char* name;
  Call call;
};

const Op kOps[] = {
    {"batch_norm_stats",
     [](Operands& o) {
       cpu::batch_norm_stats({o.activation(), o.vector_out(), o.vector_out(), o.vector_out(), 1e-5,
                              o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_relu",
     [](Operands& o) {
       cpu::bn_relu({o.activation(), o.norm(), o.shape.affine ? o.vector() : nullptr, o.out(),
                     o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_relu_backward_reduce",
     [](Operands& o) {
       cpu::bn_relu_backward_reduce({o.activation(), o.activation(), o.norm(), o.vector_out(), o.vector_out(),
                                     o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_relu_backward",
     [](Operands& o) {
       cpu::bn_relu_backward(
           {o.activation(), o.activation(), o.norm(), o.sums(), o.out(), o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_add_relu",
     [](Operands& o) {
       cpu::bn_add_relu({o.activation(), o.norm(), o.activation(), o.out(), o.mask_out(), o.shape.matrix(),
                         o.shape.dtype});
     }},
    {"bn_add_relu_backward_reduce",
     [](Operands& o) {
       cpu::bn_add_relu_backward_reduce({o.activation(), o.mask(), o.activation(), o.norm(), o.vector_out(),
                                         o.vector_out(), o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_add_relu_backward",
     [](Operands& o) {
       cpu::bn_add_relu_backward({o.activation(), o.mask(), o.activation(), o.norm(), o.sums(), o.out(),
                                  o.shape.affine ? o.out() : nullptr, o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_bn_add_relu",
     [](Operands& o) {
       cpu::bn_bn_add_relu({o.activation(), o.norm(), o.activation(), o.norm(), o.out(), o.mask_out(),
                            o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_bn_add_relu_backward_reduce",
     [](Operands& o) {
       cpu::bn_bn_add_relu_backward_reduce({o.activation(), o.mask(), o.activation(), o.norm(),
                                            o.activation(), o.norm(), o.vector_out(), o.vector_out(),
                                            o.vector_out(), o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_bn_add_relu_backward",
     [](Operands& o) {
       cpu::bn_bn_add_relu_backward({o.activation(), o.mask(), o.activation(), o.norm(), o.sums(),
                                     o.activation(), o.norm(), o.sums(), o.out(), o.out(), o.shape.matrix(),
                                     o.shape.dtype});
     }},
    {"masked_grad",
     [](Operands& o) {
       cpu::masked_grad({o.activation(), o.mask(), o.out(), false, nullptr, o.shape.matrix(), o.shape.dtype});
     }},
    {"masked_grad accumulate sum",
     [](Operands& o) {
       cpu::masked_grad({o.activation(), o.mask(), o.memory.sum_of(o.shape.dtype, o.shape.elements()), true,
                         static_cast<double*>(o.memory.sum_of(Dtype::f64, o.shape.channels)),
                         o.shape.matrix(), o.shape.dtype});
     }},
    {"bn_relu_maxpool",
     [](Operands& o) {
       cpu::bn_relu_maxpool({o.activation(), o.norm(), o.pooled_out(),
                             static_cast<uint8_t*>(o.memory.result(o.shape.pooled())), o.shape.image(),
                             o.shape.dtype});
     }},
    {"bn_relu_maxpool_backward_reduce",
     [](Operands& o) {
       cpu::bn_relu_maxpool_backward_reduce({o.pooled(), o.memory.bytes(o.shape.pooled()), o.activation(),
                                             o.norm(), o.vector_out(), o.vector_out(), o.shape.image(),
                                             o.shape.dtype});
     }},
    {"bn_relu_maxpool_backward",
     [](Operands& o) {
       cpu::bn_relu_maxpool_backward({o.pooled(), o.memory.bytes(o.shape.pooled()), o.activation(), o.norm(),
                                      o.sums(), o.out(), o.shape.image(), o.shape.dtype});
     }},
};

// The last of them has work for several threads.
constexpr int64_t kSizes[][4] = {{0, 4, 3, 3},   {2, 0, 3, 3},   {2, 4, 0, 3},   {1, 1, 1, 1},
                                 {2, 3, 7, 9},   {3, 70, 5, 7},  {2, 64, 2, 13}, {1, 523, 1, 2},
                                 {2, 3, 67, 31}, {3, 67, 15, 17}};

}  // namespace

std::vector<Case> elementwise_cases() {
  std::vector<Case> cases;
  for (const Op& op : kOps)
    for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
      for (const bool channels_last : {false, true})
        for (const auto& size : kSizes) {
          // Both kinds of batch norm, one of them without weight and bias.
          for (const bool full : {false, true}) {
            const Shape shape{size[0], size[1], size[2], size[3], channels_last, dtype, full, full};
            std::string name = std::string(op.name) + " " + name_of(dtype) +
                               (channels_last ? " channels_last (" : " contiguous (");
            for (int i = 0; i < 4; i++) name += std::to_string(size[i]) + (i < 3 ? ", " : ")");
            if (full) name += " batch statistics";
            cases.push_back({name, [&op, shape](Memory& memory) {
                               Operands operands{memory, shape};
                               op.call(operands);
                             }});
          }
        }
  return cases;
}

}  // namespace harness
