// relu(bn(y)), and its backward, which recomputes from y what the ReLU let through.
#include "blocks.h"

namespace resnet_fused::cpu {
namespace {

template <class T>
struct Forward {
  const T* y;
  T* out;
  Panel<Stat<T>> panel;
  bool shifted;
};

template <bool kShifted, class T>
RESNET_FUSED_INLINE void forward(const Forward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, 1);
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T* y = args.y + at;
      T* out = args.out + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      const S* shift = kShifted ? panel.vector(3) + lane : nullptr;
      const int count = n;
      prefetch(y, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S z = (load(y[i]) - mean[i]) * scale[i] + bias[i];
        const S activated = z <= 0 ? S(0) : z;
        out[i] = store<T>(kShifted ? activated - shift[i] : activated);
      }
    });
}

RESNET_FUSED_CLONE_EACH(run, Forward, args.shifted ? forward<true>(args) : forward<false>(args))

template <class T>
struct Reduce {
  const T *grad, *y;
  Panel<Stat<T>> panel;
  double* sums;
};

template <class T>
RESNET_FUSED_INLINE void reduce(const Reduce<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, kRowsAtOnce);
  sum_tiles<2>(panel, args.sums,
               [&](S* tile, int64_t row, int64_t lane, auto n, auto rows) RESNET_FUSED_INLINED {
                 const int64_t at = panel.at(row, lane);
                 const T *grad = args.grad + at, *y = args.y + at;
                 const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane,
                         *bias = panel.vector(2) + lane;
                 const int count = n;
                 constexpr int kRows = rows;
                 for (int r = 0; r < kRows; r++) {
                   prefetch(grad + r * panel.stride, ahead, n);
                   prefetch(y + r * panel.stride, ahead, n);
                 }
                 RESNET_FUSED_VECTOR
                 for (int i = 0; i < count; i++) {
                   S sum_dz = 0, sum_dz_centred = 0;
                   RESNET_FUSED_UNROLL
                   for (int r = 0; r < kRows; r++) {
                     const S centred = load(y[r * panel.stride + i]) - mean[i];
                     const S da = load(grad[r * panel.stride + i]);
                     const S dz = centred * scale[i] + bias[i] <= 0 ? S(0) : da;
                     sum_dz += dz;
                     sum_dz_centred += dz * centred;
                   }
                   tile[i] += sum_dz;
                   tile[kTileLanes + i] += sum_dz_centred;
                 }
               });
}

RESNET_FUSED_CLONE_EACH(run, Reduce, reduce(args))

template <class T>
struct Backward {
  const T *grad, *y;
  T* dy;
  Panel<Stat<T>> panel;
  bool batch_statistics;
};

template <bool kBatchStatistics, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, 1);
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T *grad = args.grad + at, *y = args.y + at;
      T* dy = args.dy + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      const S *slope = panel.vector(3) + lane, *offset = panel.vector(4) + lane;
      const int count = n;
      prefetch(grad, ahead, n);
      prefetch(y, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S centred = load(y[i]) - mean[i], da = load(grad[i]);
        const S dz = centred * scale[i] + bias[i] <= 0 ? S(0) : da;
        const S sum = kBatchStatistics ? dz + (centred * slope[i] + offset[i]) : dz;
        dy[i] = store<T>(scale[i] * sum);
      }
    });
}

RESNET_FUSED_CLONE_EACH(run, Backward, args.batch_statistics ? backward<true>(args) : backward<false>(args))

}  // namespace

void bn_relu(const BnRelu& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* shift = static_cast<const Stat<T>*>(op.shift);
    Vectors<Stat<T>> vectors(shift ? 4 : 3, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    if (shift) std::copy_n(shift, op.shape.channels, vectors[3]);
    for_each_panel(Runs(op.shape, false), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Forward<T>{static_cast<const T*>(op.y), static_cast<T*>(op.out), panel, shift != nullptr});
    });
  });
}

void bn_relu_backward_reduce(const BnReluBackwardReduce& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    Vectors<S> vectors(3, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    reduce_panels<2>(
        Runs(op.shape, false), vectors,
        [&](const Panel<S>& panel, double* sums) {
          run(Reduce<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), panel, sums});
        },
        {{op.sum_dz, nullptr}, {op.sum_dz_xhat, op.norm.invstd}});
  });
}

void bn_relu_backward(const BnReluBackward& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    Vectors<Stat<T>> vectors(5, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    fill_backward(op.norm, op.sums, op.shape.pixels(), vectors, 3);
    for_each_panel(Runs(op.shape, false), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Backward<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), static_cast<T*>(op.dy),
                      panel, has_sums(op.sums)});
    });
  });
}

}  // namespace resnet_fused::cpu
