// relu(bn(y) + residual), which leaves one bit an element for its backward.
#include "blocks.h"

namespace resnet_fused::cpu {
namespace {

template <class T>
struct Forward {
  const T *y, *residual;
  T* out;
  uint8_t* mask;
  Panel<Stat<T>> panel;
};

template <class T>
RESNET_FUSED_INLINE void forward(const Forward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, 1);
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T *y = args.y + at, *residual = args.residual + at;
      T* out = args.out + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      const int count = n;
      alignas(64) uint8_t active[kBlock] = {};
      prefetch(y, ahead, n);
      prefetch(residual, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S z = (load(y[i]) - mean[i]) * scale[i] + bias[i] + load(residual[i]);
        out[i] = store<T>(z <= 0 ? S(0) : z);
        active[i] = !(z <= 0);
      }
      pack_mask(active, n, args.mask + panel.mask_at(row, lane));
    });
}

RESNET_FUSED_CLONE_EACH(run, Forward, forward(args))

template <class T>
struct Reduce {
  const T *grad, *y;
  const uint8_t* mask;
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
                 const S* mean = panel.vector(0) + lane;
                 const int count = n;
                 constexpr int kRows = rows;
                 alignas(64) uint8_t active[kRows * kBlock];
                 for (int r = 0; r < kRows; r++) {
                   prefetch(grad + r * panel.stride, ahead, n);
                   prefetch(y + r * panel.stride, ahead, n);
                   unpack_mask(args.mask + panel.mask_at(row + r, lane), n, active + r * kBlock);
                 }
                 RESNET_FUSED_VECTOR
                 for (int i = 0; i < count; i++) {
                   S sum_dz = 0, sum_dz_centred = 0;
                   RESNET_FUSED_UNROLL
                   for (int r = 0; r < kRows; r++) {
                     const S da = load(grad[r * panel.stride + i]);
                     const S dz = active[r * kBlock + i] ? da : S(0);
                     sum_dz += dz;
                     sum_dz_centred += dz * (load(y[r * panel.stride + i]) - mean[i]);
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
  const uint8_t* mask;
  T *dy, *dresidual;
  Panel<Stat<T>> panel;
  bool batch_statistics;
};

template <bool kBatchStatistics, bool kResidual, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, 1);
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T *grad = args.grad + at, *y = args.y + at;
      T *dy = args.dy + at, *dresidual = kResidual ? args.dresidual + at : nullptr;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane;
      const S *slope = panel.vector(2) + lane, *offset = panel.vector(3) + lane;
      const int count = n;
      alignas(64) uint8_t active[kBlock];
      unpack_mask(args.mask + panel.mask_at(row, lane), n, active);
      prefetch(grad, ahead, n);
      if (kBatchStatistics) prefetch(y, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S da = load(grad[i]);
        const S dz = active[i] ? da : S(0);
        const S sum = kBatchStatistics ? dz + ((load(y[i]) - mean[i]) * slope[i] + offset[i]) : dz;
        if (kResidual) dresidual[i] = store<T>(dz);
        dy[i] = store<T>(scale[i] * sum);
      }
    });
}

template <bool kResidual, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  args.batch_statistics ? backward<true, kResidual>(args) : backward<false, kResidual>(args);
}

RESNET_FUSED_CLONE_EACH(run, Backward, args.dresidual ? backward<true>(args) : backward<false>(args))

}  // namespace

void bn_add_relu(const BnAddRelu& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    Vectors<Stat<T>> vectors(3, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    for_each_panel(Runs(op.shape, true), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Forward<T>{static_cast<const T*>(op.y), static_cast<const T*>(op.residual), static_cast<T*>(op.out),
                     op.mask, panel});
    });
  });
}

void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    Vectors<S> vectors(1, op.shape.channels);
    fill_mean(op.norm, vectors, 0);
    reduce_panels<2>(
        Runs(op.shape, true), vectors,
        [&](const Panel<S>& panel, double* sums) {
          run(Reduce<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), op.mask, panel, sums});
        },
        {{op.sum_dz, nullptr}, {op.sum_dz_xhat, op.norm.invstd}});
  });
}

void bn_add_relu_backward(const BnAddReluBackward& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    Vectors<Stat<T>> vectors(4, op.shape.channels);
    fill_mean(op.norm, vectors, 0);
    fill_scale(op.norm, vectors, 1);
    fill_backward(op.norm, op.sums, op.shape.pixels(), vectors, 2);
    for_each_panel(Runs(op.shape, true), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Backward<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), op.mask,
                      static_cast<T*>(op.dy), static_cast<T*>(op.dresidual), panel, has_sums(op.sums)});
    });
  });
}

}  // namespace resnet_fused::cpu
