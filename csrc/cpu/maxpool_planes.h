// bn_relu_maxpool on contiguous tensors: a plane at a time, all of one channel.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "element.h"

namespace resnet_fused::cpu {

// The pixels of y and of the pooled output. Window element kh*3+kw of pooled pixel (r, c) is pixel
// (2r-1+kh, 2c-1+kw) of y, if there is one.
struct PoolShape {
  int64_t height, width, pooled_height, pooled_width;

  // As unsigned numbers, those before the first are beyond the last.
  RESNET_FUSED_INLINE bool contains(int64_t row, int64_t column) const {
    return uint64_t(row) < uint64_t(height) && uint64_t(column) < uint64_t(width);
  }
};

template <class T>
struct PoolPlane {
  const T* y;
  T* out;
  uint8_t* indices;
  Stat<T> mean, scale, bias;
  PoolShape shape;
  Stat<T>* buffer;  // three rows of width + 2
};

template <class T>
RESNET_FUSED_INLINE void pool_plane(const PoolPlane<T>& args) {
  using S = Stat<T>;
  const PoolShape shape = args.shape;
  const S mean = args.mean, scale = args.scale, bias = args.bias;
  const int64_t pitch = shape.width + 2;
  // Row r of y is in slot (r + 1) % 3, with a border that never is the maximum.
  const auto fill = [&](int64_t row) RESNET_FUSED_INLINED {
    constexpr S kBorder = -std::numeric_limits<S>::infinity();
    S* z = args.buffer + (row + 1) % 3 * pitch;
    const bool inside = row >= 0 && row < shape.height;
    const T* y = args.y + (inside ? row * shape.width : 0);
    z[0] = z[shape.width + 1] = kBorder;
    RESNET_FUSED_VECTOR
    for (int64_t i = 0; i < shape.width; i++) {
      const S value = (load(y[i]) - mean) * scale + bias;
      z[i + 1] = inside ? value : kBorder;
    }
  };
  fill(-1);
  for (int64_t row = 0; row < shape.pooled_height; row++) {
    fill(2 * row);
    fill(2 * row + 1);
    const S* rows[3];
    for (int kh = 0; kh < 3; kh++) rows[kh] = args.buffer + (2 * row + kh) % 3 * pitch;
    T* out = args.out + row * shape.pooled_width;
    uint8_t* indices = args.indices + row * shape.pooled_width;
    RESNET_FUSED_VECTOR
    for (int64_t i = 0; i < shape.pooled_width; i++) {
      S best = 0;
      Lane<S> index = kNoGradient;
      RESNET_FUSED_UNROLL
      for (int k = 0; k < 9; k++) {
        const S z = rows[k / 3][2 * i + k % 3];
        const bool wins = (z > best) | (z != z);
        best = wins ? z : best;
        index = wins ? k : index;
      }
      out[i] = store<T>(best);
      indices[i] = uint8_t(index);
    }
  }
}

template <class T>
struct ReducePlane {
  const T *grad, *y;
  const uint8_t* indices;
  Stat<T> mean;
  PoolShape shape;
  double* sums;  // of dz and of dz * (y - mean)
};

template <class T>
RESNET_FUSED_INLINE void reduce_plane(const ReducePlane<T>& args) {
  using S = Stat<T>;
  const PoolShape shape = args.shape;
  for (int64_t row = 0; row < shape.pooled_height; row++) {
    S sum_dz = 0, sum_dz_centred = 0;
    const auto add = [&](int64_t column, auto at_border) RESNET_FUSED_INLINED {
      const int64_t at = row * shape.pooled_width + column;
      const int k = args.indices[at];
      if (k >= kNoGradient) return;
      const int64_t y_row = 2 * row - 1 + k / 3, y_column = 2 * column - 1 + k % 3;
      if (at_border && !shape.contains(y_row, y_column)) return;
      const S dz = load(args.grad[at]);
      const T y = args.y[y_row * shape.width + y_column];
      sum_dz += dz;
      sum_dz_centred += dz * (load(y) - args.mean);
    };
    // Columns [1, last) of a row that is not at the border have windows inside of y.
    const bool inside = row > 0 && 2 * row + 1 < shape.height;
    const int64_t last = inside ? shape.width / 2 : 1;
    add(0, std::true_type{});
    for (int64_t column = 1; column < last; column++) add(column, std::false_type{});
    for (int64_t column = last < 1 ? 1 : last; column < shape.pooled_width; column++)
      add(column, std::true_type{});
    args.sums[0] += double(sum_dz);
    args.sums[1] += double(sum_dz_centred);
  }
}

template <class T>
struct BackwardPlane {
  const T *grad, *y;
  const uint8_t* indices;
  T* dy;
  Stat<T> mean, scale, slope, offset;
  bool batch_statistics;
  PoolShape shape;
  Stat<T>* buffer;  // three rows of width + 2
};

template <class T>
RESNET_FUSED_INLINE void backward_plane(const BackwardPlane<T>& args) {
  using S = Stat<T>;
  const PoolShape shape = args.shape;
  const S mean = args.mean, scale = args.scale, slope = args.slope, offset = args.offset;
  const int64_t pitch = shape.width + 2;
  // dz of row r of y is in slot (r + 1) % 3, pixel i at i + 1.
  const auto slot = [&](int64_t row) RESNET_FUSED_INLINED { return args.buffer + (row + 1) % 3 * pitch; };
  const auto clear = [&](int64_t row) RESNET_FUSED_INLINED {
    S* dz = slot(row);
    for (int64_t i = 0; i < pitch; i++) dz[i] = S(0);
  };
  const auto write = [&](int64_t row) RESNET_FUSED_INLINED {
    if (row < 0 || row >= shape.height) return;
    const S* dz = slot(row) + 1;
    const T* y = args.y + row * shape.width;
    T* dy = args.dy + row * shape.width;
    if (args.batch_statistics) {
      RESNET_FUSED_VECTOR
      for (int64_t i = 0; i < shape.width; i++)
        dy[i] = store<T>(scale * (dz[i] + ((load(y[i]) - mean) * slope + offset)));
    } else {
      RESNET_FUSED_VECTOR
      for (int64_t i = 0; i < shape.width; i++) dy[i] = store<T>(dz[i] * scale);
    }
  };
  clear(-1);
  for (int64_t row = 0; row < shape.pooled_height; row++) {
    clear(2 * row);
    clear(2 * row + 1);
    S* rows[3];
    for (int kh = 0; kh < 3; kh++) rows[kh] = slot(2 * row - 1 + kh);
    for (int64_t column = 0; column < shape.pooled_width; column++) {
      const int64_t at = row * shape.pooled_width + column;
      const int k = args.indices[at];
      if (k < kNoGradient) rows[k / 3][2 * column + k % 3] += load(args.grad[at]);
    }
    write(2 * row - 1);
    write(2 * row);
  }
  write(2 * shape.pooled_height - 1);
}

}  // namespace resnet_fused::cpu
