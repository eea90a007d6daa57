// relu(bn(y) + bn(skip)), the end of a downsample block; one bit an element for its backward.
#include "blocks.h"

namespace resnet_fused::cpu {
namespace {

template <class T>
struct Forward {
  const T *y, *skip;
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
      const T *y = args.y + at, *skip = args.skip + at;
      T* out = args.out + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      const S *skip_mean = panel.vector(3) + lane, *skip_scale = panel.vector(4) + lane;
      const int count = n;
      alignas(64) uint8_t active[kBlock] = {};
      prefetch(y, ahead, n);
      prefetch(skip, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S z =
            (load(y[i]) - mean[i]) * scale[i] + ((load(skip[i]) - skip_mean[i]) * skip_scale[i] + bias[i]);
        out[i] = store<T>(z <= 0 ? S(0) : z);
        active[i] = !(z <= 0);
      }
      pack_mask(active, n, args.mask + panel.mask_at(row, lane));
    });
}

RESNET_FUSED_CLONE_EACH(run, Forward, forward(args))

template <class T>
struct Reduce {
  const T *grad, *y, *skip;
  const uint8_t* mask;
  Panel<Stat<T>> panel;
  double* sums;
};

template <class T>
RESNET_FUSED_INLINE void reduce(const Reduce<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, kRowsAtOnce);
  sum_tiles<3>(panel, args.sums,
               [&](S* tile, int64_t row, int64_t lane, auto n, auto rows) RESNET_FUSED_INLINED {
                 const int64_t at = panel.at(row, lane);
                 const T *grad = args.grad + at, *y = args.y + at, *skip = args.skip + at;
                 const S *mean = panel.vector(0) + lane, *skip_mean = panel.vector(1) + lane;
                 const int count = n;
                 constexpr int kRows = rows;
                 alignas(64) uint8_t active[kRows * kBlock];
                 for (int r = 0; r < kRows; r++) {
                   prefetch(grad + r * panel.stride, ahead, n);
                   prefetch(y + r * panel.stride, ahead, n);
                   prefetch(skip + r * panel.stride, ahead, n);
                   unpack_mask(args.mask + panel.mask_at(row + r, lane), n, active + r * kBlock);
                 }
                 RESNET_FUSED_VECTOR
                 for (int i = 0; i < count; i++) {
                   S sum_dz = 0, sum_dz_centred = 0, sum_dz_skip_centred = 0;
                   RESNET_FUSED_UNROLL
                   for (int r = 0; r < kRows; r++) {
                     const S da = load(grad[r * panel.stride + i]);
                     const S dz = active[r * kBlock + i] ? da : S(0);
                     sum_dz += dz;
                     sum_dz_centred += dz * (load(y[r * panel.stride + i]) - mean[i]);
                     sum_dz_skip_centred += dz * (load(skip[r * panel.stride + i]) - skip_mean[i]);
                   }
                   tile[i] += sum_dz;
                   tile[kTileLanes + i] += sum_dz_centred;
                   tile[2 * kTileLanes + i] += sum_dz_skip_centred;
                 }
               });
}

RESNET_FUSED_CLONE_EACH(run, Reduce, reduce(args))

template <class T>
struct Backward {
  const T *grad, *y, *skip;
  const uint8_t* mask;
  T *dy, *dskip;
  Panel<Stat<T>> panel;
  bool batch_statistics, skip_batch_statistics;
};

template <bool kBatchStatistics, bool kSkipBatchStatistics, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, 1);
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T *grad = args.grad + at, *y = args.y + at, *skip = args.skip + at;
      T *dy = args.dy + at, *dskip = args.dskip + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane;
      const S *slope = panel.vector(2) + lane, *offset = panel.vector(3) + lane;
      const S *skip_mean = panel.vector(4) + lane, *skip_scale = panel.vector(5) + lane;
      const S *skip_slope = panel.vector(6) + lane, *skip_offset = panel.vector(7) + lane;
      const int count = n;
      alignas(64) uint8_t active[kBlock];
      unpack_mask(args.mask + panel.mask_at(row, lane), n, active);
      prefetch(grad, ahead, n);
      if (kBatchStatistics) prefetch(y, ahead, n);
      if (kSkipBatchStatistics) prefetch(skip, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S da = load(grad[i]);
        const S dz = active[i] ? da : S(0);
        const S sum = kBatchStatistics ? dz + ((load(y[i]) - mean[i]) * slope[i] + offset[i]) : dz;
        const S skip_sum = kSkipBatchStatistics
                               ? dz + ((load(skip[i]) - skip_mean[i]) * skip_slope[i] + skip_offset[i])
                               : dz;
        dy[i] = store<T>(scale[i] * sum);
        dskip[i] = store<T>(skip_scale[i] * skip_sum);
      }
    });
}

template <class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  if (args.batch_statistics)
    args.skip_batch_statistics ? backward<true, true>(args) : backward<true, false>(args);
  else
    args.skip_batch_statistics ? backward<false, true>(args) : backward<false, false>(args);
}

RESNET_FUSED_CLONE_EACH(run, Backward, backward(args))

}  // namespace

void bn_bn_add_relu(const BnBnAddRelu& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    const int64_t channels = op.shape.channels;
    Vectors<S> vectors(6, channels);
    fill_affine(op.norm, vectors, 0);
    fill_affine(op.skip_norm, vectors, 3);
    for (int64_t c = 0; c < channels; c++) vectors[2][c] += vectors[5][c];
    for_each_panel(Runs(op.shape, true), vectors, [&](const Panel<S>& panel) {
      run(Forward<T>{static_cast<const T*>(op.y), static_cast<const T*>(op.skip), static_cast<T*>(op.out),
                     op.mask, panel});
    });
  });
}

void bn_bn_add_relu_backward_reduce(const BnBnAddReluBackwardReduce& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    Vectors<S> vectors(2, op.shape.channels);
    fill_mean(op.norm, vectors, 0);
    fill_mean(op.skip_norm, vectors, 1);
    reduce_panels<3>(
        Runs(op.shape, true), vectors,
        [&](const Panel<S>& panel, double* sums) {
          run(Reduce<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y),
                        static_cast<const T*>(op.skip), op.mask, panel, sums});
        },
        {{op.sum_dz, nullptr}, {op.sum_dz_xhat, op.norm.invstd}, {op.sum_dz_skip_xhat, op.skip_norm.invstd}});
  });
}

void bn_bn_add_relu_backward(const BnBnAddReluBackward& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    const int64_t pixels = op.shape.pixels();
    Vectors<S> vectors(8, op.shape.channels);
    fill_mean(op.norm, vectors, 0);
    fill_scale(op.norm, vectors, 1);
    fill_backward(op.norm, op.sums, pixels, vectors, 2);
    fill_mean(op.skip_norm, vectors, 4);
    fill_scale(op.skip_norm, vectors, 5);
    fill_backward(op.skip_norm, op.skip_sums, pixels, vectors, 6);
    for_each_panel(Runs(op.shape, true), vectors, [&](const Panel<S>& panel) {
      run(Backward<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y),
                      static_cast<const T*>(op.skip), op.mask, static_cast<T*>(op.dy),
                      static_cast<T*>(op.dskip), panel, has_sums(op.sums), has_sums(op.skip_sums)});
    });
  });
}

}  // namespace resnet_fused::cpu
