// relu(bn(y)), and its backward, which recomputes from y what the ReLU let through.
#include "blocks.h"

namespace resnet_fused::cpu {
namespace {

template <class T>
struct Forward {
  const T* y;
  T* out;
  Panel<Stat<T>> panel;
  bool stream;
};

template <bool kStream, class T>
RESNET_FUSED_INLINE void forward(const Forward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T* y = args.y + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      write_block<kStream>(args.out + at, n, [&](int i) RESNET_FUSED_INLINED {
        const S z = (load(y[i]) - mean[i]) * scale[i] + bias[i];
        return store<T>(z <= 0 ? S(0) : z);
      });
    });
}

RESNET_FUSED_CLONE_EACH(run, Forward, args.stream ? forward<true>(args) : forward<false>(args))

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
  sum_tiles<2>(panel, args.sums, [&](S* tile, int64_t row, int64_t lane, auto n, auto rows) RESNET_FUSED_INLINED {
    const int64_t at = panel.at(row, lane);
    const T *grad = args.grad + at, *y = args.y + at;
    const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
    const int count = n;
    constexpr int kRows = rows;
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
  bool batch_statistics, stream;
};

template <bool kBatchStatistics, bool kStream, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T *grad = args.grad + at, *y = args.y + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      const S *slope = panel.vector(3) + lane, *offset = panel.vector(4) + lane;
      write_block<kStream>(args.dy + at, n, [&](int i) RESNET_FUSED_INLINED {
        const S centred = load(y[i]) - mean[i];
        const S da = load(grad[i]);
        const S dz = centred * scale[i] + bias[i] <= 0 ? S(0) : da;
        if constexpr (!kBatchStatistics) return store<T>(dz * scale[i]);
        return store<T>(scale[i] * (dz + (centred * slope[i] + offset[i])));
      });
    });
}

template <bool kBatchStatistics, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  args.stream ? backward<kBatchStatistics, true>(args) : backward<kBatchStatistics, false>(args);
}

RESNET_FUSED_CLONE_EACH(run, Backward, args.batch_statistics ? backward<true>(args) : backward<false>(args))

}  // namespace

void bn_relu(const BnRelu& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    Vectors<Stat<T>> vectors(3, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    const bool stream = streams<T>(op.out, op.shape);
    for_each_panel(Runs(op.shape, false), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Forward<T>{static_cast<const T*>(op.y), static_cast<T*>(op.out), panel, stream});
    });
  });
}

void bn_relu_backward_reduce(const BnReluBackwardReduce& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    Vectors<S> vectors(3, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    reduce_panels<2>(Runs(op.shape, false), vectors,
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
    const bool stream = streams<T>(op.dy, op.shape);
    for_each_panel(Runs(op.shape, false), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Backward<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), static_cast<T*>(op.dy), panel,
                      has_sums(op.sums), stream});
    });
  });
}

}  // namespace resnet_fused::cpu
