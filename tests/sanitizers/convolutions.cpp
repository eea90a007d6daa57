// Calls of the convolutions, all of which are float32 and channels_last.
#include "harness.h"

namespace harness {
namespace {

// What the operands of a convolution compute while they are loaded.
struct Lazy {
  const char* name;
  bool activation_norm, gradient_norm, mask, batch_statistics;
};

const Lazy kLazy[] = {
    {"plain", false, false, false, false},       {"masked", true, false, true, false},
    {"frozen", true, true, false, false},        {"batch statistics", true, true, false, true},
    {"frozen masked", false, true, true, false}, {"batch statistics masked", true, true, true, true},
};

struct Shape {
  int64_t batch, inputs, outputs, height, width;
  Image image() const { return {batch, inputs, height, width, true}; }
  int64_t pixels() const { return batch * height * width; }
};

struct Operands {
  Memory& memory;
  const Lazy& lazy;

  float* floats(int64_t count) { return static_cast<float*>(memory.values(Dtype::f32, count)); }
  void* result(int64_t count) { return memory.result(count * 4); }
  Norm norm(int64_t channels) {
    void* mean = floats(channels);
    void* invstd = memory.positive(Dtype::f32, channels);
    return {mean, invstd, floats(channels), floats(channels)};
  }
  LazyActivation activation(int64_t pixels, int64_t channels) {
    const float* x = floats(pixels * channels);
    return {x, lazy.activation_norm ? norm(channels) : Norm{}};
  }
  LazyGradient gradient(int64_t pixels, int64_t channels) {
    LazyGradient dy{};
    dy.g = floats(pixels * channels);
    if (lazy.mask) dy.mask = memory.mask(pixels, channels);
    if (!lazy.gradient_norm) return dy;
    dy.y = floats(pixels * channels);
    dy.norm = norm(channels);
    if (lazy.batch_statistics) dy.sums = {floats(channels), floats(channels)};
    return dy;
  }
  // Contiguous, or channels_last.
  Weight3x3 weight(int64_t outputs, int64_t inputs, bool channels_last) {
    const float* data = floats(outputs * inputs * 9);
    if (channels_last) return {data, {inputs * 9, 1, inputs * 3, inputs}};
    return {data, {inputs * 9, 9, 3, 1}};
  }
};

void forward(Operands& o, const Shape& s) {
  const LazyActivation a = o.activation(s.pixels(), s.inputs);
  const bool training = o.lazy.batch_statistics;
  void *y = o.result(s.pixels() * s.outputs), *mean = training ? o.result(s.outputs) : nullptr;
  void *var = training ? o.result(s.outputs) : nullptr, *invstd = training ? o.result(s.outputs) : nullptr;
  cpu::conv3x3_forward(
      {a, o.weight(s.outputs, s.inputs, training), y, mean, var, invstd, 1e-5, s.image(), s.outputs});
}

void dgrad(Operands& o, const Shape& s) {
  const LazyGradient dy = o.gradient(s.pixels(), s.outputs);
  const LazyActivation a = o.activation(s.pixels(), s.inputs);
  const bool sums = o.lazy.activation_norm;
  const void* residual = o.lazy.mask ? o.floats(s.pixels() * s.inputs) : nullptr;
  const uint8_t* mask = residual && o.lazy.gradient_norm ? o.memory.mask(s.pixels(), s.inputs) : nullptr;
  void *da = o.result(s.pixels() * s.inputs), *sum_dz = sums ? o.result(s.inputs) : nullptr;
  cpu::conv3x3_dgrad({dy, o.weight(s.outputs, s.inputs, sums), a, residual, mask, da, sum_dz,
                      sums ? o.result(s.inputs) : nullptr, s.image(), s.outputs});
}

void wgrad(Operands& o, const Shape& s) {
  const LazyGradient dy = o.gradient(s.pixels(), s.outputs);
  const LazyActivation a = o.activation(s.pixels(), s.inputs);
  cpu::conv3x3_wgrad({dy, a, o.result(9 * s.outputs * s.inputs), s.image(), s.outputs});
}

void inference(Operands& o, const Shape& s) {
  const int64_t elements = cpu::conv3x3_filter_elements(s.inputs, s.outputs);
  // Not a result: padding between its chunks is never read and stays as it is.
  std::vector<float> filters(static_cast<size_t>(elements));
  cpu::conv3x3_filters({o.weight(s.outputs, s.inputs, o.lazy.mask), filters.data(), s.inputs, s.outputs});
  const float *x = o.floats(s.pixels() * s.inputs), *bias = o.floats(s.outputs);
  const float* residual = o.lazy.mask ? o.floats(s.pixels() * s.outputs) : nullptr;
  cpu::conv3x3_inference(
      {x, filters.data(), bias, residual, o.result(s.pixels() * s.outputs), s.image(), s.outputs});
}

struct Geometry {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

constexpr Geometry kGeometries[] = {
    {{1, 1}, {1, 1}, {0, 0}, {1, 1}}, {{1, 1}, {2, 2}, {0, 0}, {1, 1}}, {{3, 3}, {1, 1}, {1, 1}, {1, 1}},
    {{3, 3}, {2, 2}, {1, 1}, {1, 1}}, {{3, 2}, {1, 3}, {2, 1}, {2, 1}}, {{7, 7}, {2, 2}, {3, 3}, {1, 1}},
};

void any_wgrad(Operands& o, const Shape& s, const Geometry& at) {
  int64_t sizes[2] = {s.height, s.width};
  for (int i = 0; i < 2; i++) {
    const int64_t last = sizes[i] + 2 * at.padding[i] - at.dilation[i] * (at.kernel[i] - 1) - 1;
    sizes[i] = last < 0 ? 0 : last / at.stride[i] + 1;
  }
  const LazyGradient dy = o.gradient(s.batch * sizes[0] * sizes[1], s.outputs);
  const LazyActivation a = o.activation(s.pixels(), s.inputs);
  void* dweight = o.result(s.outputs * s.inputs * at.kernel[0] * at.kernel[1]);
  cpu::conv_wgrad({dy,
                   a,
                   dweight,
                   o.lazy.mask ? o.result(s.outputs) : nullptr,
                   s.image(),
                   s.outputs,
                   sizes[0],
                   sizes[1],
                   {at.kernel[0], at.kernel[1]},
                   {at.stride[0], at.stride[1]},
                   {at.padding[0], at.padding[1]},
                   {at.dilation[0], at.dilation[1]}});
}

// Single pixels, rows longer than a block of tiles, sums taken in parts and not, and a weight that is larger
// than a second-level cache.
constexpr Shape kShapes[] = {{1, 1, 1, 1, 1},   {2, 3, 5, 7, 9},     {3, 17, 33, 6, 5},
                             {1, 9, 8, 3, 261}, {2, 66, 70, 13, 11}, {1, 264, 250, 5, 4}};

struct Op {
  const char* name;
  void (*call)(Operands&, const Shape&);
};

constexpr Op kOps[] = {{"conv3x3_forward", forward},
                       {"conv3x3_dgrad", dgrad},
                       {"conv3x3_wgrad", wgrad},
                       {"conv3x3_inference", inference}};

std::string shape_name(const Shape& s) {
  return std::to_string(s.batch) + "x" + std::to_string(s.inputs) + "x" + std::to_string(s.height) + "x" +
         std::to_string(s.width) + " to " + std::to_string(s.outputs);
}

}  // namespace

std::vector<Case> convolution_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, const Shape& shape, const auto& call) {
    for (const Lazy& lazy : kLazy)
      cases.push_back({name + " " + shape_name(shape) + " " + lazy.name, [&lazy, call](Memory& memory) {
                         Operands operands{memory, lazy};
                         call(operands);
                       }});
  };
  for (const Shape& shape : kShapes)
    for (const Op& op : kOps)
      add(op.name, shape, [op, shape](Operands& operands) { op.call(operands, shape); });
  for (const Shape& shape : {kShapes[1], kShapes[2], kShapes[4]})
    for (const Geometry& geometry : kGeometries)
      add("conv_wgrad of a " + std::to_string(geometry.kernel[0]) + "x" + std::to_string(geometry.kernel[1]) +
              " kernel, stride " + std::to_string(geometry.stride[1]),
          shape, [shape, &geometry](Operands& operands) { any_wgrad(operands, shape, geometry); });
  return cases;
}

}  // namespace harness
