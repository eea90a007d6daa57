// The gradient w.r.t. the weight of a 3x3 convolution of stride 1 and padding 1, by Winograd's F(3x3, 2x2): a
// tile's 2x2 gradients are the filter, its 4x4 inputs what it is applied to.
//
// Some blocks of tiles at a time are transformed, V [block][point][panel of inputs][tile][input] and
// D [block][point][group of outputs][tile][output]; then D^T V is added to sums [point][output][input]. A
// thread owns its part of the sums, to which blocks are added in order whatever the number of threads.

// sums[r][j] (+)= sum over tiles of d[t][r] * v[t][j] for r < kGradRows and j < kPanel.
RESNET_FUSED_INLINE void gemm_tn(const float* d, const float* v, int64_t tiles, bool accumulate, float* sums,
                                 int64_t stride) {
  Vec total[kGradRows][kVectors] = {};
  for (int64_t t = 0; t < tiles; t++) {
    Vec columns[kVectors];
    RESNET_FUSED_UNROLL
    for (int i = 0; i < kVectors; i++) columns[i] = load(v + i * kLanes);
    RESNET_FUSED_UNROLL
    for (int r = 0; r < kGradRows; r++) {
      const float element = d[r];
      RESNET_FUSED_UNROLL
      for (int i = 0; i < kVectors; i++) total[r][i] += columns[i] * element;
    }
    v += kPanel;
    d += kLanes;
  }
  RESNET_FUSED_UNROLL
  for (int r = 0; r < kGradRows; r++) RESNET_FUSED_UNROLL
  for (int i = 0; i < kVectors; i++) {
    float* to = sums + r * stride + i * kLanes;
    store(to, accumulate ? load(to) + total[r][i] : total[r][i]);
  }
}

// G g G^T of a tile's 2x2 gradients.
RESNET_FUSED_INLINE void transform_gradient(const Vec (&g)[4], Vec (&out)[kPoints]) {
  Vec t[4][2];
  RESNET_FUSED_UNROLL
  for (int j = 0; j < 2; j++) {
    t[0][j] = g[j];
    t[1][j] = (g[j] + g[2 + j]) * 0.5f;
    t[2][j] = (g[j] - g[2 + j]) * 0.5f;
    t[3][j] = g[2 + j];
  }
  RESNET_FUSED_UNROLL
  for (int i = 0; i < 4; i++) {
    out[4 * i] = t[i][0];
    out[4 * i + 1] = (t[i][0] + t[i][1]) * 0.5f;
    out[4 * i + 2] = (t[i][0] - t[i][1]) * 0.5f;
    out[4 * i + 3] = t[i][1];
  }
}

// A^T m A: the 3x3 taps of transformed sums.
RESNET_FUSED_INLINE void transform_taps(const float* sums, int64_t point_stride, Vec (&out)[9]) {
  Vec t[3][4];
  RESNET_FUSED_UNROLL
  for (int j = 0; j < 4; j++) {
    const float* column = sums + j * point_stride;
    const Vec m0 = load(column), m1 = load(column + 4 * point_stride), m2 = load(column + 8 * point_stride),
              m3 = load(column + 12 * point_stride);
    t[0][j] = m0 + m1 + m2;
    t[1][j] = m1 - m2;
    t[2][j] = m1 + m2 - m3;
  }
  RESNET_FUSED_UNROLL
  for (int i = 0; i < 3; i++) {
    out[3 * i] = t[i][0] + t[i][1] + t[i][2];
    out[3 * i + 1] = t[i][1] - t[i][2];
    out[3 * i + 2] = t[i][1] + t[i][2] - t[i][3];
  }
}

// Sizes and places of the transformed tiles and of the sums.
struct WgradLayout {
  int64_t inputs, outputs, panels, groups, most;
  int64_t v_stride, d_stride, block_size, padded_inputs, padded_outputs, sums_size;

  WgradLayout(int64_t inputs, int64_t outputs, int64_t most) : inputs(inputs), outputs(outputs), most(most) {
    panels = (inputs + kPanel - 1) / kPanel;
    groups = (outputs + kLanes - 1) / kLanes;
    // One row more, so that the points of a tile don't fall into one set of the cache.
    v_stride = panels * most * kPanel + kPanel;
    d_stride = groups * most * kLanes + kLanes;
    block_size = kPoints * (v_stride + d_stride);
    padded_inputs = panels * kPanel;
    padded_outputs = groups * kLanes;
    sums_size = kPoints * padded_outputs * padded_inputs;
  }
};

// Transforms a block's inputs and gradients.
template <class A, class Dy>
void transform_block(const A& a, const Dy& dy, const Tiling& tiling, const WgradLayout& at, int64_t block,
                     float* window, float* v) {
  float* d = v + kPoints * at.v_stride;
  tiling.each_run(block, [&](const Run& run, int64_t first) {
    const int64_t row_stride = (2 * run.cols + 2) * kChannelChunk;
    for (int64_t c0 = 0; c0 < at.inputs; c0 += kChannelChunk) {
      const int64_t channels = std::min(kChannelChunk, at.inputs - c0);
      fill_window(a, tiling, run, c0, channels, window);
      for (int64_t tile = 0; tile < run.tiles(); tile++) {
        const float* from =
            window + 2 * (tile / run.cols) * row_stride + 2 * (tile % run.cols) * kChannelChunk;
        for (int64_t c = 0; c < channels; c += kLanes) {
          Vec points[kPoints];
          transform_input(from + c, row_stride, points);
          float* to = v + ((c0 + c) / kPanel * at.most + first + tile) * kPanel + (c0 + c) % kPanel;
          RESNET_FUSED_UNROLL
          for (int p = 0; p < kPoints; p++) store(to + p * at.v_stride, points[p]);
        }
      }
    }
    for (int64_t tile = 0; tile < run.tiles(); tile++) {
      const int64_t row = 2 * (run.row + tile / run.cols), col = 2 * (run.col + tile % run.cols);
      const int64_t pixel = (run.image * tiling.height + row) * tiling.width + col;
      const bool below = row + 1 < tiling.height, right = col + 1 < tiling.width;
      for (int64_t k = 0; k < at.outputs; k += kLanes) {
        const int n = int(std::min<int64_t>(kLanes, at.outputs - k));
        const Vec g[4] = {dy.at(pixel, k, n), right ? dy.at(pixel + 1, k, n) : Vec{},
                          below ? dy.at(pixel + tiling.width, k, n) : Vec{},
                          below && right ? dy.at(pixel + tiling.width + 1, k, n) : Vec{}};
        Vec points[kPoints];
        transform_gradient(g, points);
        float* to = d + (k / kLanes * at.most + first + tile) * kLanes;
        RESNET_FUSED_UNROLL
        for (int p = 0; p < kPoints; p++) store(to + p * at.d_stride, points[p]);
      }
    }
  });
}

// Adds a block's D^T V to the sums of one point and one panel of inputs, or sets them.
inline void add_block(const WgradLayout& at, const float* block, int64_t tiles, int64_t point, int64_t panel,
                      bool accumulate, float* sums) {
  const float* v = block + point * at.v_stride + panel * at.most * kPanel;
  const float* d = block + kPoints * at.v_stride + point * at.d_stride;
  float* to = sums + point * at.padded_outputs * at.padded_inputs + panel * kPanel;
  for (int64_t k = 0; k < at.padded_outputs; k += kGradRows)
    gemm_tn(d + k / kLanes * at.most * kLanes + k % kLanes, v, tiles, accumulate, to + k * at.padded_inputs,
            at.padded_inputs);
}

template <class A, class Dy>
void winograd_wgrad(const Conv3x3Wgrad& op, const A& a, const Dy& dy) {
  const Tiling tiling(op.shape, kBlockTiles);
  const WgradLayout at(op.shape.channels, op.outputs, tiling.most_tiles());
  const int64_t window_size = tiling.window_elements(), threads = num_threads();
  // Independent of the number of threads, as the order of summation is.
  const int64_t parts = at.sums_size * 4 <= kPartialBytes ? std::min(tiling.blocks, kParts) : 1;
  const auto begin = [&](int64_t part) { return tiling.blocks * part / parts; };
  Buffer sums(parts * at.sums_size);
  if (parts > 1 && parts % threads == 0) {
    // Everything stays in a thread's cache.
    parallel_for_dynamic(parts, [&](int64_t part) {
      float* block = scratch(at.block_size + window_size);
      for (int64_t b = begin(part); b < begin(part + 1); b++) {
        transform_block(a, dy, tiling, at, b, block + at.block_size, block);
        for (int64_t task = 0; task < kPoints * at.panels; task++)
          add_block(at, block, tiling.tiles(b), task / at.panels, task % at.panels, b > begin(part),
                    sums.data() + part * at.sums_size);
      }
    });
  } else {
    const int64_t at_once = std::clamp<int64_t>(kSharedTiles / at.most, 1, tiling.blocks);
    Buffer blocks(at_once * at.block_size);
    for (int64_t part = 0; part < parts; part++)
      for (int64_t first = begin(part); first < begin(part + 1); first += at_once) {
        const int64_t count = std::min(at_once, begin(part + 1) - first);
        parallel_for_dynamic(count, [&](int64_t slot) {
          transform_block(a, dy, tiling, at, first + slot, scratch(window_size),
                          blocks.data() + slot * at.block_size);
        });
        parallel_for_dynamic(kPoints * at.panels, [&](int64_t task) {
          for (int64_t slot = 0; slot < count; slot++)
            add_block(at, blocks.data() + slot * at.block_size, tiling.tiles(first + slot), task / at.panels,
                      task % at.panels, first + slot > begin(part), sums.data() + part * at.sums_size);
        });
      }
  }
  float* dweight = static_cast<float*>(op.dweight);
  parallel_for_dynamic(at.outputs, [&](int64_t k) {
    for (int64_t c = 0; c < at.inputs; c += kLanes) {
      alignas(64) float total[kPoints][kLanes];
      const float* from = sums.data() + k * at.padded_inputs + c;
      for (int p = 0; p < kPoints; p++, from += at.padded_outputs * at.padded_inputs) {
        Vec sum = load(from);
        for (int64_t part = 1; part < parts; part++) sum += load(from + part * at.sums_size);
        store(total[p], sum);
      }
      Vec taps[9];
      transform_taps(total[0], kLanes, taps);
      for (int t = 0; t < 9; t++)
        store(dweight + (k * 9 + t) * at.inputs + c, taps[t], int(std::min<int64_t>(kLanes, at.inputs - c)));
    }
  });
}

inline void winograd_wgrad(const Conv3x3Wgrad& op) {
  const int64_t pixels = op.shape.batch * op.shape.height * op.shape.width;
  with_activation(op.a, op.shape.channels, [&](const auto& a) {
    with_gradient(op.dy, op.outputs, pixels, [&](const auto& dy) { winograd_wgrad(op, a, dy); });
  });
}
