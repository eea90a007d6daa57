// What is done with a convolution's outputs before they are stored: see run_epilogue of winograd.h.

// body(pixel, value) for the outputs of a block's tiles, kLanes channels of them.
template <class Body>
RESNET_FUSED_INLINE void each_output(const Tiling& tiling, int64_t block, const float* m, int64_t m_stride,
                                     const Body& body) {
  tiling.each_run(block, [&](const Run& run, int64_t first) RESNET_FUSED_INLINED {
    for (int64_t tile_row = 0; tile_row < run.rows; tile_row++) {
      const int64_t row = 2 * (run.row + tile_row);
      const int rows = row + 1 < tiling.height ? 2 : 1;
      for (int64_t tile_col = 0; tile_col < run.cols; tile_col++) {
        const int64_t col = 2 * (run.col + tile_col);
        const int cols = col + 1 < tiling.width ? 2 : 1;
        Vec values[4];
        transform_output(m + (first + tile_row * run.cols + tile_col) * kPanel, m_stride, values);
        const int64_t pixel = (run.image * tiling.height + row) * tiling.width + col;
        for (int i = 0; i < rows; i++)
          for (int j = 0; j < cols; j++) body(pixel + i * tiling.width + j, values[2 * i + j]);
      }
    }
  });
}

// body(pixel) for the same pixels.
template <class Body>
RESNET_FUSED_INLINE int64_t each_pixel(const Tiling& tiling, int64_t block, const Body& body) {
  int64_t pixels = 0;
  tiling.each_run(block, [&](const Run& run, int64_t) RESNET_FUSED_INLINED {
    const int64_t last_row = std::min(2 * (run.row + run.rows), tiling.height);
    const int64_t last_col = std::min(2 * (run.col + run.cols), tiling.width);
    for (int64_t row = 2 * run.row; row < last_row; row++)
      for (int64_t col = 2 * run.col; col < last_col; col++) {
        body((run.image * tiling.height + row) * tiling.width + col);
        pixels++;
      }
  });
  return pixels;
}

// y, and mean and M2 of a block's values.
struct ForwardEpilogue {
  float* y;
  int64_t channels;
  double *means, *squares;  // [block][channel]; null: not asked for

  RESNET_FUSED_INLINE void prefetch(int64_t pixel, int64_t k) const {
    for (int64_t line = 0; line < kPanel; line += 16) __builtin_prefetch(y + pixel * channels + k + line, 1);
  }
  void run(const Tiling& tiling, int64_t block, const float* m, int64_t m_stride, int64_t k, int n) const {
    Vec sum{};
    int64_t count = 0;
    each_output(tiling, block, m, m_stride, [&](int64_t pixel, Vec value) RESNET_FUSED_INLINED {
      store(y + pixel * channels + k, value, n);
      sum += value;
      count++;
    });
    if (means == nullptr) return;
    // About the block's own mean, while it is in the cache.
    const Vec centre = sum / float(count);
    Vec s1{}, s2{};
    each_pixel(tiling, block, [&](int64_t pixel) RESNET_FUSED_INLINED {
      const Vec d = load(y + pixel * channels + k, n) - centre;
      s1 += d;
      s2 += d * d;
    });
    for (int i = 0; i < n; i++) {
      const double shift = double(s1[i]) / double(count);
      means[block * channels + k + i] = double(centre[i]) + shift;
      squares[block * channels + k + i] = std::max(double(s2[i]) - double(s1[i]) * shift, 0.0);
    }
  }
};

// da, plus a residual where there is one, and the sums that backward of the input's batch norm needs.
template <bool kSums>
struct DgradEpilogue {
  float* da;
  int64_t channels;
  const float* residual;  // null: none
  const uint8_t* mask;    // of the residual; null: none
  const float* y;         // the batch norm's input
  const Vectors<float>* vectors;
  double *sum_dz, *sum_dz_centred;  // [block][channel]

  RESNET_FUSED_INLINE void prefetch(int64_t pixel, int64_t k) const {
    const int64_t at = pixel * channels + k;
    for (int64_t line = 0; line < kPanel; line += 16) {
      __builtin_prefetch(da + at + line, 1);
      if (kSums) __builtin_prefetch(y + at + line);
      if (residual != nullptr) __builtin_prefetch(residual + at + line);
    }
  }
  void run(const Tiling& tiling, int64_t block, const float* m, int64_t m_stride, int64_t k, int n) const {
    Vec s1{}, s2{}, mean{}, scale{}, bias{};
    if (kSums) {
      mean = load((*vectors)[0] + k);
      scale = load((*vectors)[1] + k);
      bias = load((*vectors)[2] + k);
    }
    const int64_t mask_stride = (channels + 7) / 8;
    each_output(tiling, block, m, m_stride, [&](int64_t pixel, Vec value) RESNET_FUSED_INLINED {
      if (residual != nullptr) {
        Vec added = load(residual + pixel * channels + k, n);
        if (mask != nullptr) added = mask_lanes(mask + pixel * mask_stride, k, n) ? added : Vec{};
        value += added;
      }
      store(da + pixel * channels + k, value, n);
      if (kSums) {
        const Vec centred = load(y + pixel * channels + k, n) - mean;
        const Vec dz = centred * scale + bias <= 0 ? Vec{} : value;
        s1 += dz;
        s2 += dz * centred;
      }
    });
    if (kSums)
      for (int i = 0; i < n; i++) {
        sum_dz[block * channels + k + i] = s1[i];
        sum_dz_centred[block * channels + k + i] = s2[i];
      }
  }
};

// relu(y + bias + residual)
struct InferenceEpilogue {
  float* out;
  int64_t channels;
  const float *bias, *residual;  // residual null: none

  RESNET_FUSED_INLINE void prefetch(int64_t pixel, int64_t k) const {
    const int64_t at = pixel * channels + k;
    for (int64_t line = 0; line < kPanel; line += 16) {
      __builtin_prefetch(out + at + line, 1);
      if (residual != nullptr) __builtin_prefetch(residual + at + line);
    }
  }
  void run(const Tiling& tiling, int64_t block, const float* m, int64_t m_stride, int64_t k, int n) const {
    const Vec added = load(bias + k, n);
    each_output(tiling, block, m, m_stride, [&](int64_t pixel, Vec value) RESNET_FUSED_INLINED {
      const int64_t at = pixel * channels + k;
      value += added;
      if (residual != nullptr) value += load(residual + at, n);
      store(out + at, relu(value), n);
    });
  }
};
