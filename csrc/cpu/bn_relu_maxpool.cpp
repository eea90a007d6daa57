// max_pool2d(relu(bn(y)), 3, stride=2, padding=1), the end of the stem. Forward leaves a byte an output
// element that says which element of the window it came from, so that backward needs neither the ReLU's
// output nor a mask of it.
#include "blocks.h"
#include "maxpool_planes.h"

namespace resnet_fused::cpu {
namespace {

PoolShape pool_shape(const Image& image) {
  return {image.height, image.width, image.pooled_height(), image.pooled_width()};
}

constexpr int kTaps = 9;

// The nine elements of a window, channels_last: where their channels start, and their place in the window.
// One outside the image repeats the one before it (or the first inside), so that it changes neither the
// maximum nor which of the elements was the first to reach it.
template <class T>
struct Taps {
  const T* at[kTaps];
  int code[kTaps];

  RESNET_FUSED_INLINE Taps(const T* y, const PoolShape& shape, int64_t channels, int64_t row,
                           int64_t column) {
    int inside = (row == 0 ? 3 : 0) + (column == 0 ? 1 : 0);
    for (int k = 0; k < kTaps; k++) {
      const int64_t r = 2 * row - 1 + k / 3, c = 2 * column - 1 + k % 3;
      if (r >= 0 && r < shape.height && c >= 0 && c < shape.width) inside = k;
      code[k] = inside;
      at[k] = y + ((2 * row - 1 + inside / 3) * shape.width + 2 * column - 1 + inside % 3) * channels;
    }
  }

  // What a window some columns further on reads first: two pixels of each row.
  template <class N>
  RESNET_FUSED_INLINE void prefetch_row(int64_t channels, int64_t lane, N n) const {
    const int64_t ahead = prefetch_distance<T>(2 * channels, 1) + lane;
    for (int k = 1; k < kTaps; k += 3) {
      prefetch(at[k], ahead, n);
      prefetch(at[k], ahead + channels, n);
    }
  }
};

template <class T>
struct PoolRow {
  const T* y;  // of the image; out and indices of the pooled row
  T* out;
  uint8_t* indices;
  Panel<Stat<T>> panel;  // a row for each pooled pixel
  PoolShape shape;
  int64_t row;
};

template <class T>
RESNET_FUSED_INLINE void pool_row(const PoolRow<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  for (int64_t column = 0; column < args.shape.pooled_width; column++) {
    const Taps<T> taps(args.y, args.shape, panel.lanes, args.row, column);
    for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane, *bias = panel.vector(2) + lane;
      T* out = args.out + column * panel.lanes + lane;
      uint8_t* indices = args.indices + column * panel.lanes + lane;
      const int count = n;
      taps.prefetch_row(panel.lanes, lane, n);
      alignas(64) Lane<S> chosen[kBlock];
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        S best = 0;
        Lane<S> index = kNoGradient;
        RESNET_FUSED_UNROLL
        for (int k = 0; k < kTaps; k++) {
          const S z = (load(taps.at[k][lane + i]) - mean[i]) * scale[i] + bias[i];
          const bool wins = (z > best) | (z != z);
          best = wins ? z : best;
          index = wins ? taps.code[k] : index;
        }
        out[i] = store<T>(best);
        chosen[i] = index;
      }
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) indices[i] = uint8_t(chosen[i]);
    });
  }
}

RESNET_FUSED_CLONE_EACH(run, PoolRow, pool_row(args))
RESNET_FUSED_CLONE_EACH(run, PoolPlane, pool_plane(args))

template <class T>
struct ReduceRow {
  const T *grad, *y;  // of the pooled row, of the image
  const uint8_t* indices;
  Panel<Stat<T>> panel;
  PoolShape shape;
  int64_t row;
  double* sums;
};

template <class T>
RESNET_FUSED_INLINE void reduce_row(const ReduceRow<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  sum_tiles<2, 1>(panel, args.sums,
                  [&](S* tile, int64_t column, int64_t lane, auto n, auto) RESNET_FUSED_INLINED {
                    const Taps<T> taps(args.y, args.shape, panel.lanes, args.row, column);
                    const S* mean = panel.vector(0) + lane;
                    const T* grad = args.grad + column * panel.lanes + lane;
                    const uint8_t* indices = args.indices + column * panel.lanes + lane;
                    const int count = n;
                    taps.prefetch_row(panel.lanes, lane, n);
                    // Widened on its own: a loop over bytes would have four times the lanes of one over
                    // floats, too many for its registers.
                    alignas(64) Lane<S> index[kBlock];
                    RESNET_FUSED_VECTOR
                    for (int i = 0; i < count; i++) index[i] = indices[i];
                    for (int k = 0; k < kTaps; k++) {
                      if (taps.code[k] == k) continue;
                      RESNET_FUSED_VECTOR
                      for (int i = 0; i < count; i++) index[i] = index[i] == k ? kNoGradient : index[i];
                    }
                    RESNET_FUSED_VECTOR
                    for (int i = 0; i < count; i++) {
                      S y = 0;  // at most one tap is added
                      RESNET_FUSED_UNROLL
                      for (int k = 0; k < kTaps; k++) {
                        const S tap = load(taps.at[k][lane + i]);
                        y += index[i] == k ? tap : S(0);
                      }
                      const S da = load(grad[i]);
                      const S dz = index[i] < kNoGradient ? da : S(0);
                      tile[i] += dz;
                      tile[kTileLanes + i] += dz * (y - mean[i]);
                    }
                  });
}

RESNET_FUSED_CLONE_EACH(run, ReduceRow, reduce_row(args))
RESNET_FUSED_CLONE_EACH(run, ReducePlane, reduce_plane(args))

template <class T>
struct BackwardRow {
  const T *grad, *y;  // of the pooled image; of the row
  const uint8_t* indices;
  T* dy;
  Panel<Stat<T>> panel;
  PoolShape shape;
  int64_t row;
  bool batch_statistics;
};

// A place in a window that no byte names.
constexpr int kNowhere = 256;

// A pixel's windows along one axis: an even one lies in the middle of one, an odd one at the end of one and,
// unless the image ends there, at the beginning of the next. `place` is the pixel's place in the window, or
// kNowhere.
struct Windows {
  int count;
  int64_t at[2];
  int place[2];

  RESNET_FUSED_INLINE Windows(int64_t pixel, int64_t pooled) {
    count = pixel % 2 == 0 ? 1 : 2;
    at[0] = pixel / 2;
    place[0] = pixel % 2 == 0 ? 1 : 2;
    const bool has_next = pixel % 2 == 1 && at[0] + 1 < pooled;
    at[1] = has_next ? at[0] + 1 : at[0];
    place[1] = has_next ? 0 : kNowhere;
  }
};

template <int kWindows, bool kBatchStatistics, class T>
RESNET_FUSED_INLINE void backward_pixel(const BackwardRow<T>& args, const Windows& rows,
                                        const Windows& columns, int64_t column) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  const int64_t ahead = prefetch_distance<T>(panel.lanes, 1);
  int64_t at[kWindows];
  int code[kWindows];
  for (int w = 0; w < kWindows; w++) {
    const int r = w / columns.count, c = w % columns.count;
    at[w] = (rows.at[r] * args.shape.pooled_width + columns.at[c]) * panel.lanes;
    code[w] = 3 * rows.place[r] + columns.place[c];
  }
  for_each_block(panel.lanes, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
    const T* y = args.y + column * panel.lanes + lane;
    const S *mean = panel.vector(0) + lane, *scale = panel.vector(1) + lane;
    const S *slope = panel.vector(2) + lane, *offset = panel.vector(3) + lane;
    T* dy = args.dy + column * panel.lanes + lane;
    const int count = n;
    alignas(64) Lane<S> index[kWindows][kBlock];
    for (int w = 0; w < kWindows; w++) {
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) index[w][i] = args.indices[at[w] + lane + i];
    }
    if (kBatchStatistics) prefetch(y, ahead, n);
    RESNET_FUSED_VECTOR
    for (int i = 0; i < count; i++) {
      S dz = 0;
      RESNET_FUSED_UNROLL
      for (int w = 0; w < kWindows; w++) {
        const S da = load(args.grad[at[w] + lane + i]);
        dz += index[w][i] == code[w] ? da : S(0);
      }
      const S sum = kBatchStatistics ? dz + ((load(y[i]) - mean[i]) * slope[i] + offset[i]) : dz;
      dy[i] = store<T>(scale[i] * sum);
    }
  });
}

template <bool kBatchStatistics, class T>
RESNET_FUSED_INLINE void backward_row(const BackwardRow<T>& args) {
  const Windows rows(args.row, args.shape.pooled_height);
  for (int64_t column = 0; column < args.shape.width; column++) {
    const Windows columns(column, args.shape.pooled_width);
    switch (rows.count * columns.count) {
      case 1:
        backward_pixel<1, kBatchStatistics>(args, rows, columns, column);
        break;
      case 2:
        backward_pixel<2, kBatchStatistics>(args, rows, columns, column);
        break;
      default:
        backward_pixel<4, kBatchStatistics>(args, rows, columns, column);
    }
  }
}

RESNET_FUSED_CLONE_EACH(run, BackwardRow,
                        args.batch_statistics ? backward_row<true>(args) : backward_row<false>(args))
RESNET_FUSED_CLONE_EACH(run, BackwardPlane, backward_plane(args))

// body(begin, end) for ranges of units, spread over the threads.
template <class Body>
void for_each_range(int64_t units, int64_t elements, const Body& body) {
  if (units == 0) return;
  const int64_t useful = (elements + kTaskElements - 1) / kTaskElements;
  const int64_t tasks = std::max<int64_t>(1, std::min({units, useful, int64_t(num_threads())}));
  parallel_for(tasks, [&](int64_t task) { body(units * task / tasks, units * (task + 1) / tasks); });
}

template <class S>
Panel<S> pixels_panel(const Vectors<S>& vectors, int64_t pixels) {
  return {0, 0, pixels, vectors.channels(), vectors.channels(), 0, vectors[0], vectors.channels()};
}

}  // namespace

void bn_relu_maxpool(const BnReluMaxpool& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    const PoolShape shape = pool_shape(op.shape);
    const int64_t channels = op.shape.channels, plane = shape.height * shape.width;
    const int64_t pooled_plane = shape.pooled_height * shape.pooled_width;
    const int64_t elements = op.shape.batch * channels * plane;
    const T* y = static_cast<const T*>(op.y);
    T* out = static_cast<T*>(op.out);
    Vectors<S> vectors(3, channels);
    fill_affine(op.norm, vectors, 0);
    if (elements == 0) return;
    if (op.shape.channels_last) {
      const Panel<S> panel = pixels_panel(vectors, shape.pooled_width);
      for_each_range(op.shape.batch * shape.pooled_height, elements, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const int64_t at = row * shape.pooled_width * channels;
          run(PoolRow<T>{y + row / shape.pooled_height * plane * channels, out + at, op.indices + at, panel,
                         shape, row % shape.pooled_height});
        }
      });
      return;
    }
    for_each_range(op.shape.batch * channels, elements, [&](int64_t begin, int64_t end) {
      std::vector<S> buffer(3 * (shape.width + 2));
      for (int64_t p = begin; p < end; p++) {
        const int64_t c = p % channels;
        run(PoolPlane<T>{y + p * plane, out + p * pooled_plane, op.indices + p * pooled_plane, vectors[0][c],
                         vectors[1][c], vectors[2][c], shape, buffer.data()});
      }
    });
  });
}

void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    const PoolShape shape = pool_shape(op.shape);
    const int64_t batch = op.shape.batch, channels = op.shape.channels, plane = shape.height * shape.width;
    const int64_t pooled_plane = shape.pooled_height * shape.pooled_width;
    const T *grad = static_cast<const T*>(op.grad), *y = static_cast<const T*>(op.y);
    Vectors<S> vectors(1, channels);
    fill_mean(op.norm, vectors, 0);
    // As in reduce_panels(): tasks by shape alone, the last one first, their sums added in order.
    const int64_t units =
        channels * plane == 0 ? 0 : batch * (op.shape.channels_last ? shape.pooled_height : channels);
    const int64_t useful = (batch * channels * plane + kTaskElements - 1) / kTaskElements;
    const int64_t tasks = std::min({units, useful, kReduceTasks});
    const int64_t slots = op.shape.channels_last ? tasks : units == 0 ? 0 : batch;
    std::vector<double> sums(slots * 2 * channels);
    if (tasks > 0)
      for_each_backwards(tasks, [&](int64_t task) {
        for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; unit++) {
          if (op.shape.channels_last) {
            const int64_t at = unit * shape.pooled_width * channels;
            run(ReduceRow<T>{grad + at, y + unit / shape.pooled_height * plane * channels, op.indices + at,
                             pixels_panel(vectors, shape.pooled_width), shape, unit % shape.pooled_height,
                             &sums[task * 2 * channels]});
          } else {
            double plane_sums[2] = {};
            const int64_t c = unit % channels, at = unit * pooled_plane,
                          slot = unit / channels * 2 * channels;
            run(ReducePlane<T>{grad + at, y + unit * plane, op.indices + at, vectors[0][c], shape,
                               plane_sums});
            sums[slot + c] = plane_sums[0];
            sums[slot + channels + c] = plane_sums[1];
          }
        }
      });
    for (int64_t c = 0; c < channels; c++) {
      double sum_dz = 0, sum_dz_centred = 0;
      for (int64_t slot = 0; slot < slots; slot++) {
        sum_dz += sums[slot * 2 * channels + c];
        sum_dz_centred += sums[slot * 2 * channels + channels + c];
      }
      static_cast<S*>(op.sum_dz)[c] = S(sum_dz);
      static_cast<S*>(op.sum_dz_xhat)[c] =
          S(slots == 0 ? 0 : sum_dz_centred * double(static_cast<const S*>(op.norm.invstd)[c]));
    }
  });
}

void bn_relu_maxpool_backward(const BnReluMaxpoolBackward& op) {
  dispatch(op.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Stat<T>;
    const PoolShape shape = pool_shape(op.shape);
    const int64_t channels = op.shape.channels, plane = shape.height * shape.width;
    const int64_t pooled_plane = shape.pooled_height * shape.pooled_width;
    const int64_t elements = op.shape.batch * channels * plane;
    const T *grad = static_cast<const T*>(op.grad), *y = static_cast<const T*>(op.y);
    T* dy = static_cast<T*>(op.dy);
    Vectors<S> vectors(4, channels);
    fill_mean(op.norm, vectors, 0);
    fill_scale(op.norm, vectors, 1);
    fill_backward(op.norm, op.sums, op.shape.batch * plane, vectors, 2);
    if (elements == 0) return;
    if (op.shape.channels_last) {
      const Panel<S> panel = pixels_panel(vectors, shape.width);
      for_each_range(op.shape.batch * shape.height, elements, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const int64_t at = row * shape.width * channels,
                        pooled = row / shape.height * pooled_plane * channels;
          run(BackwardRow<T>{grad + pooled, y + at, op.indices + pooled, dy + at, panel, shape,
                             row % shape.height, has_sums(op.sums)});
        }
      });
      return;
    }
    for_each_range(op.shape.batch * channels, elements, [&](int64_t begin, int64_t end) {
      std::vector<S> buffer(3 * (shape.width + 2));
      for (int64_t p = begin; p < end; p++) {
        const int64_t c = p % channels;
        run(BackwardPlane<T>{grad + p * pooled_plane, y + p * plane, op.indices + p * pooled_plane,
                             dy + p * plane, vectors[0][c], vectors[1][c], vectors[2][c], vectors[3][c],
                             has_sums(op.sums), shape, buffer.data()});
      }
    });
  });
}

}  // namespace resnet_fused::cpu
