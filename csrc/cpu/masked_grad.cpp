// The gradient w.r.t. a ReLU's input from its saved mask, written or added to what is there, and its sum by
// channel.
#include "blocks.h"

namespace resnet_fused::cpu {
namespace {

template <class T>
struct Copy {
  const T* grad;
  const uint8_t* mask;
  T* out;
  Panel<Stat<T>> panel;
  bool accumulate;
};

template <bool kAccumulate, class T>
RESNET_FUSED_INLINE void copy(const Copy<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, 1);
  for (int64_t row = 0; row < panel.rows; row++)
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const int64_t at = panel.at(row, lane);
      const T* grad = args.grad + at;
      T* out = args.out + at;
      const int count = n;
      alignas(64) uint8_t active[kBlock];
      unpack_mask(args.mask + panel.mask_at(row, lane), n, active);
      prefetch(grad, ahead, n);
      if (kAccumulate) prefetch(out, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        const S da = load(grad[i]);
        const S dz = active[i] ? da : S(0);
        out[i] = store<T>(kAccumulate ? load(out[i]) + dz : dz);
      }
    });
}

RESNET_FUSED_CLONE_EACH(run, Copy, args.accumulate ? copy<true>(args) : copy<false>(args))

template <class T>
struct CopyAndSum {
  const T* grad;
  const uint8_t* mask;
  T* out;
  Panel<Stat<T>> panel;
  bool accumulate;
  double* sums;
};

template <bool kAccumulate, class T>
RESNET_FUSED_INLINE void copy_and_sum(const CopyAndSum<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.stride, kRowsAtOnce);
  sum_tiles<1>(panel, args.sums,
               [&](S* tile, int64_t row, int64_t lane, auto n, auto rows) RESNET_FUSED_INLINED {
                 const int64_t at = panel.at(row, lane);
                 const T* grad = args.grad + at;
                 T* out = args.out + at;
                 const int count = n;
                 constexpr int kRows = rows;
                 alignas(64) uint8_t active[kRows * kBlock];
                 for (int r = 0; r < kRows; r++) {
                   prefetch(grad + r * panel.stride, ahead, n);
                   if (kAccumulate) prefetch(out + r * panel.stride, ahead, n);
                   unpack_mask(args.mask + panel.mask_at(row + r, lane), n, active + r * kBlock);
                 }
                 RESNET_FUSED_VECTOR
                 for (int i = 0; i < count; i++) {
                   S sum = 0;
                   RESNET_FUSED_UNROLL
                   for (int r = 0; r < kRows; r++) {
                     const S da = load(grad[r * panel.stride + i]);
                     const S dz = active[r * kBlock + i] ? da : S(0);
                     T& to = out[r * panel.stride + i];
                     to = store<T>(kAccumulate ? load(to) + dz : dz);
                     sum += dz;
                   }
                   tile[i] += sum;
                 }
               });
}

RESNET_FUSED_CLONE_EACH(run, CopyAndSum,
                        args.accumulate ? copy_and_sum<true>(args) : copy_and_sum<false>(args))

}  // namespace

void masked_grad(const MaskedGrad& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    const T* grad = static_cast<const T*>(op.grad);
    T* out = static_cast<T*>(op.out);
    const Runs runs(op.shape, true);
    const Vectors<S> none(0, op.shape.channels);
    if (op.sum == nullptr) {
      for_each_panel(runs, none,
                     [&](const Panel<S>& panel) { run(Copy<T>{grad, op.mask, out, panel, op.accumulate}); });
      return;
    }
    sum_panels<1>(
        runs, none,
        [&](const Panel<S>& panel, double* sums) {
          run(CopyAndSum<T>{grad, op.mask, out, panel, op.accumulate, sums});
        },
        [&](int, const double* totals) {
          for (int64_t c = 0; c < op.shape.channels; c++) op.sum[c] += totals[c];
        });
  });
}

}  // namespace resnet_fused::cpu
