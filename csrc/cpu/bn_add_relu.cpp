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
  bool stream;
};

template <bool kStream, class T>
RESNET_FUSED_INLINE void forward(const Forward<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T *y = args.y + at, *residual = args.residual + at;
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      const int count = n;
      alignas(64) S z[kBlock];
      alignas(64) uint8_t kept[kBlock] = {};
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        z[i] = (load(y[i]) - mean[i]) * scale[i] + bias[i] + load(residual[i]);
        kept[i] = !(z[i] <= 0);
      }
      pack_mask(kept, n, args.mask + panel.mask_at(row, lane));
      write_block<kStream>(args.out + at, n,
                           [&](int i) RESNET_FUSED_INLINED { return store<T>(z[i] <= 0 ? S(0) : z[i]); });
    });
}

RESNET_FUSED_CLONE_EACH(run, Forward, args.stream ? forward<true>(args) : forward<false>(args))

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
  sum_tiles<2>(panel, args.sums, [&](S* tile, int64_t row, int64_t lane, auto n, auto rows) RESNET_FUSED_INLINED {
    const int64_t at = panel.at(row, lane);
    const T *grad = args.grad + at, *y = args.y + at;
    const S* mean = panel.vector(0) + lane;
    const int count = n;
    constexpr int kRows = rows;
    alignas(64) uint8_t kept[kRows * kBlock];
    for (int r = 0; r < kRows; r++) unpack_mask(args.mask + panel.mask_at(row + r, lane), n, kept + r * kBlock);
    RESNET_FUSED_VECTOR
    for (int i = 0; i < count; i++) {
      S sum_dz = 0, sum_dz_centred = 0;
      RESNET_FUSED_UNROLL
      for (int r = 0; r < kRows; r++) {
        const S da = load(grad[r * panel.stride + i]);
        const S dz = kept[r * kBlock + i] ? da : S(0);
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
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane;
      const S *slope = panel.vector(3) + lane, *offset = panel.vector(4) + lane;
      const int count = n;
      alignas(64) uint8_t kept[kBlock];
      alignas(64) S dz[kBlock];
      unpack_mask(args.mask + panel.mask_at(row, lane), n, kept);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S da = load(grad[i]);
        dz[i] = kept[i] ? da : S(0);
      }
      write_block<kStream>(args.dresidual + at, n, [&](int i) RESNET_FUSED_INLINED { return store<T>(dz[i]); });
      write_block<kStream>(args.dy + at, n, [&](int i) RESNET_FUSED_INLINED {
        if constexpr (!kBatchStatistics) return store<T>(dz[i] * scale[i]);
        return store<T>(scale[i] * (dz[i] + ((load(y[i]) - mean[i]) * slope[i] + offset[i])));
      });
    });
}

template <bool kBatchStatistics, class T>
RESNET_FUSED_INLINE void backward(const Backward<T>& args) {
  args.stream ? backward<kBatchStatistics, true>(args) : backward<kBatchStatistics, false>(args);
}

RESNET_FUSED_CLONE_EACH(run, Backward, args.batch_statistics ? backward<true>(args) : backward<false>(args))

}  // namespace

void bn_add_relu(const BnAddRelu& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    Vectors<Stat<T>> vectors(3, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    const bool stream = streams<T>(op.out, op.shape);
    for_each_panel(Runs(op.shape, true), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Forward<T>{static_cast<const T*>(op.y), static_cast<const T*>(op.residual), static_cast<T*>(op.out), op.mask,
                     panel, stream});
    });
  });
}

void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    Vectors<S> vectors(1, op.shape.channels);
    fill_mean(op.norm, vectors, 0);
    reduce_panels<2>(Runs(op.shape, true), vectors,
                     [&](const Panel<S>& panel, double* sums) {
                       run(Reduce<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), op.mask, panel, sums});
                     },
                     {{op.sum_dz, nullptr}, {op.sum_dz_xhat, op.norm.invstd}});
  });
}

void bn_add_relu_backward(const BnAddReluBackward& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    Vectors<Stat<T>> vectors(5, op.shape.channels);
    fill_affine(op.norm, vectors, 0);
    fill_backward(op.norm, op.sums, op.shape.pixels(), vectors, 3);
    const bool stream = streams<T>(op.dy, op.shape) && streams<T>(op.dresidual, op.shape);
    for_each_panel(Runs(op.shape, true), vectors, [&](const Panel<Stat<T>>& panel) {
      run(Backward<T>{static_cast<const T*>(op.grad), static_cast<const T*>(op.y), op.mask, static_cast<T*>(op.dy),
                      static_cast<T*>(op.dresidual), panel, has_sums(op.sums), stream});
    });
  });
}

}  // namespace resnet_fused::cpu
