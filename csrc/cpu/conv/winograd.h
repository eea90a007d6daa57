// 3x3 convolutions of stride 1 and padding 1 by Winograd's F(2x2, 3x3): 16 multiplications where direct
// convolution has 36. Forward, and, with the kernel turned around, the gradient w.r.t. the input.
//
// For each block of tiles: the operand's values go to a window, the transformed tiles to V [point][group of
// tiles][chunk of channels][tile][channel]; then, for a panel of outputs at a time, 16 GEMMs V U to M
// [point][tile][output] and the output transform, which has the outputs' sums in its epilogue.

// U [panel of outputs][chunk of inputs][point][input][output]: G g G^T of each filter.

// Of U, with a slice between chunks, so that they don't fall into one set of the cache.
constexpr int64_t kFilterChunk = (kPoints + 1) * kSlice;

inline int64_t filter_elements(int64_t inputs, int64_t outputs) {
  return (outputs + kPanel - 1) / kPanel * ((inputs + kLanes - 1) / kLanes) * kFilterChunk;
}

// Where the first tap is, and how far it is to another output, input or tap. Negative distances turn the
// kernel around.
struct Filters {
  const float* first;
  int64_t output_stride, input_stride, row_stride, col_stride;
};

// taps[t][c][k] of a chunk of inputs from c0 on and a panel of outputs from k0 on, zero beyond the last of
// them.
inline void load_taps(const Filters& filters, int64_t c0, int64_t inputs, int64_t k0, int64_t outputs,
                      float (&taps)[9][kLanes][kPanel]) {
  const bool is_whole = c0 + kLanes <= inputs && k0 + kPanel <= outputs;
  for (int t = 0; t < 9; t++) {
    const float* from = filters.first + k0 * filters.output_stride + c0 * filters.input_stride +
                        t / 3 * filters.row_stride + t % 3 * filters.col_stride;
    if (is_whole && filters.output_stride == 1) {
      for (int c = 0; c < kLanes; c++)
        for (int v = 0; v < kPanel; v += kLanes)
          store(taps[t][c] + v, load(from + c * filters.input_stride + v));
    } else if (is_whole && filters.input_stride == 1) {
      for (int v = 0; v < kPanel; v += kLanes) {
        Vec rows[kLanes];
        RESNET_FUSED_UNROLL
        for (int k = 0; k < kLanes; k++) rows[k] = load(from + (v + k) * filters.output_stride);
        transpose(rows);
        RESNET_FUSED_UNROLL
        for (int c = 0; c < kLanes; c++) store(taps[t][c] + v, rows[c]);
      }
    } else {
      for (int k = 0; k < kPanel; k++)
        for (int c = 0; c < kLanes; c++)
          taps[t][c][k] = c0 + c < inputs && k0 + k < outputs
                              ? from[k * filters.output_stride + c * filters.input_stride]
                              : 0.0f;
    }
  }
}

inline void transform_filters(const Filters& filters, int64_t inputs, int64_t outputs, float* u) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel, chunks = (inputs + kLanes - 1) / kLanes;
  parallel_for_dynamic(panels * chunks, [&](int64_t task) {
    alignas(64) float taps[9][kLanes][kPanel];
    load_taps(filters, task % chunks * kLanes, inputs, task / chunks * kPanel, outputs, taps);
    for (int64_t c = 0; c < kLanes; c++)
      for (int v = 0; v < kPanel; v += kLanes) {
        Vec rows[4][3];
        for (int j = 0; j < 3; j++) {
          const Vec g0 = load(taps[j][c] + v), g1 = load(taps[3 + j][c] + v), g2 = load(taps[6 + j][c] + v);
          rows[0][j] = g0;
          rows[1][j] = (g0 + g2 + g1) * 0.5f;
          rows[2][j] = (g0 + g2 - g1) * 0.5f;
          rows[3][j] = g2;
        }
        float* to = u + task * kFilterChunk + c * kPanel + v;
        for (int i = 0; i < 4; i++) {
          const Vec even = rows[i][0] + rows[i][2];
          store(to + (4 * i) * kSlice, rows[i][0]);
          store(to + (4 * i + 1) * kSlice, (even + rows[i][1]) * 0.5f);
          store(to + (4 * i + 2) * kSlice, (even - rows[i][1]) * 0.5f);
          store(to + (4 * i + 3) * kSlice, rows[i][2]);
        }
      }
  });
}

// Where transformed tiles lie: V [point][group of tiles][chunk of channels][tile of the group][channel].
struct TransformedTiles {
  int64_t chunks, rows, group_size, point_stride;

  // rows: tiles of a group, at most kRows.
  TransformedTiles(int64_t channels, int64_t tiles, int64_t rows) : rows(rows) {
    chunks = (channels + kLanes - 1) / kLanes;
    group_size = chunks * kRows * kLanes;
    // More than whole groups, so that the points of a tile don't fall into one set of the cache.
    point_stride = (tiles + rows - 1) / rows * group_size + kRows * kLanes;
  }
  float* at(float* v, int64_t tile, int64_t channel) const {
    return v + tile / rows * group_size + (channel / kLanes * kRows + tile % rows) * kLanes;
  }
};

// Transforms a run's tiles, the first of which becomes the tile `first` of V.
template <class Operand>
void transform_run(const Operand& operand, const Tiling& tiling, const Run& run, int64_t inputs,
                   float* window, const TransformedTiles& tiles, int64_t first, float* v) {
  const int64_t row_stride = (2 * run.cols + 2) * kChannelChunk;
  for (int64_t c0 = 0; c0 < inputs; c0 += kChannelChunk) {
    const int64_t channels = std::min(kChannelChunk, inputs - c0);
    fill_window(operand, tiling, run, c0, channels, window);
    for (int64_t tile = 0; tile < run.tiles(); tile++) {
      const float* from = window + 2 * (tile / run.cols) * row_stride + 2 * (tile % run.cols) * kChannelChunk;
      float* to = tiles.at(v, first + tile, c0);
      for (int64_t c = 0; c < channels; c += kLanes, to += kRows * kLanes) {
        Vec points[kPoints];
        transform_input(from + c, row_stride, points);
        RESNET_FUSED_UNROLL
        for (int p = 0; p < kPoints; p++) store(to + p * tiles.point_stride, points[p]);
      }
    }
  }
}

template <class Epilogue>
void run_epilogue(const Epilogue& epilogue, const Tiling& tiling, int64_t block, const float* m,
                  int64_t point_stride, int64_t panel, int64_t outputs) {
  for (int vector = 0; vector < kVectors; vector++) {
    const int64_t k = panel * kPanel + vector * kLanes;
    if (k < outputs)
      epilogue.run(tiling, block, m + vector * kLanes, point_stride, k,
                   int(std::min<int64_t>(kLanes, outputs - k)));
  }
}

// Block by block: V and M stay in the second-level cache, and U is read once for each block.
template <class Operand, class Epilogue>
void convolve_by_block(const Operand& operand, const Tiling& tiling, int64_t inputs, const float* u,
                       int64_t outputs, const Epilogue& epilogue) {
  const int64_t most = tiling.most_tiles(), window_size = tiling.window_elements();
  const int64_t m_stride = (most + kRows) * kPanel;
  const int64_t panels = (outputs + kPanel - 1) / kPanel, threads = num_threads();
  // With few blocks several threads share one: each transforms its input, for some panels.
  const bool is_even = tiling.blocks >= 4 * threads || tiling.blocks % threads == 0;
  const int64_t parts = is_even ? 1 : std::min(panels, threads);
  parallel_for_dynamic(tiling.blocks * parts, [&](int64_t task) {
    const int64_t block = task / parts, part = task % parts;
    const int64_t tiles = tiling.tiles(block), groups = (tiles + kRows - 1) / kRows;
    const TransformedTiles at(inputs, tiles, (tiles + groups - 1) / groups);
    float* v = scratch(kPoints * (at.point_stride + m_stride) + window_size);
    float *m = v + kPoints * at.point_stride, *window = m + kPoints * m_stride;
    tiling.each_run(block, [&](const Run& run, int64_t first) {
      transform_run(operand, tiling, run, inputs, window, at, first, v);
    });
    const int64_t first_panel = panels * part / parts, last_panel = panels * (part + 1) / parts;
    const int64_t pixel = tiling.first_pixel(block), pixels = tiling.first_pixel(block + 1) - pixel;
    // The block that this thread is likely to have next.
    const int64_t following = part == parts - 1 && tiling.segments == 1 ? block + threads : tiling.blocks;
    const bool has_next = following < tiling.blocks;
    const int64_t next = has_next ? tiling.first_pixel(following) : 0;
    const int64_t after = has_next ? tiling.first_pixel(following + 1) - next : 0;
    const int64_t slots = (last_panel - first_panel) * kPoints;
    for (int64_t panel = first_panel; panel < last_panel; panel++) {
      for (int64_t p = 0; p < kPoints; p++) {
        // GEMMs leave the memory idle: what follows them finds its lines in the cache.
        if (tiling.segments == 1)
          for (int64_t i = pixels * p / kPoints; i < pixels * (p + 1) / kPoints; i++)
            epilogue.prefetch(pixel + i, panel * kPanel);
        const int64_t slot = (panel - first_panel) * kPoints + p;
        operand.prefetch(next + after * slot / slots, next + after * (slot + 1) / slots);
        gemm(tiles, at.rows, v + p * at.point_stride, at.group_size,
             u + panel * at.chunks * kFilterChunk + p * kSlice, kFilterChunk, at.chunks, m + p * m_stride);
      }
      run_epilogue(epilogue, tiling, block, m, m_stride, panel, outputs);
    }
  });
}

// Point by point, for U that is larger than the cache: it is read once for kPointTiles tiles, and what the
// threads exchange, V and M, is small beside it.
template <class Operand, class Epilogue>
void convolve_by_point(const Operand& operand, const Tiling& tiling, int64_t inputs, const float* u,
                       int64_t outputs, const Epilogue& epilogue) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel, threads = num_threads();
  const int64_t window_size = tiling.window_elements();
  const int64_t at_once = std::clamp<int64_t>(kPointTiles / tiling.most_tiles(), 1, tiling.blocks);
  const int64_t passes = (tiling.blocks + at_once - 1) / at_once;
  const int64_t most = at_once * tiling.most_tiles();
  const TransformedTiles at(inputs, most, kRows);
  const int64_t m_stride = (most + kRows) * kPanel;
  Buffer v(kPoints * at.point_stride), m(panels * kPoints * m_stride);
  std::vector<int64_t> firsts(tiling.blocks + 1);  // tiles before a block
  for (int64_t block = 0; block < tiling.blocks; block++)
    firsts[block + 1] = firsts[block] + tiling.tiles(block);
  const int64_t parts = std::min(panels, (threads + kPoints - 1) / kPoints);
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t begin = tiling.blocks * pass / passes, end = tiling.blocks * (pass + 1) / passes;
    const int64_t tiles = firsts[end] - firsts[begin];
    parallel_for_dynamic(end - begin, [&](int64_t i) {
      float* window = scratch(window_size);
      tiling.each_run(begin + i, [&](const Run& run, int64_t first) {
        transform_run(operand, tiling, run, inputs, window, at, firsts[begin + i] - firsts[begin] + first,
                      v.data());
      });
    });
    parallel_for_dynamic(kPoints * parts, [&](int64_t task) {
      const int64_t p = task / parts, part = task % parts;
      for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++)
        gemm(tiles, kRows, v.data() + p * at.point_stride, at.group_size,
             u + panel * at.chunks * kFilterChunk + p * kSlice, kFilterChunk, at.chunks,
             m.data() + (panel * kPoints + p) * m_stride);
    });
    parallel_for_dynamic((end - begin) * panels, [&](int64_t task) {
      const int64_t block = begin + task / panels, panel = task % panels;
      run_epilogue(epilogue, tiling, block,
                   m.data() + panel * kPoints * m_stride + (firsts[block] - firsts[begin]) * kPanel, m_stride,
                   panel, outputs);
    });
  }
}

template <class Operand, class Epilogue>
void winograd_convolution(const Operand& operand, const Tiling& tiling, int64_t inputs, const float* u,
                          int64_t outputs, const Epilogue& epilogue) {
  if (filter_elements(inputs, outputs) * 4 > 4 * cache_bytes())
    return convolve_by_point(operand, tiling, inputs, u, outputs, epilogue);
  convolve_by_block(operand, tiling, inputs, u, outputs, epilogue);
}

inline Filters filters_of(const Weight3x3& weight) {
  return {weight.data, weight.strides[0], weight.strides[1], weight.strides[2], weight.strides[3]};
}

inline void winograd_filters(const Conv3x3Filters& op) {
  transform_filters(filters_of(op.weight), op.inputs, op.outputs, static_cast<float*>(op.filters));
}

inline void winograd_inference(const Conv3x3Inference& op) {
  const int64_t inputs = op.shape.channels;
  const Tiling tiling(op.shape, block_tiles(inputs));
  const InferenceEpilogue epilogue{static_cast<float*>(op.out), op.outputs,
                                   static_cast<const float*>(op.bias),
                                   static_cast<const float*>(op.residual)};
  winograd_convolution(Plain(static_cast<const float*>(op.x), inputs), tiling, inputs,
                       static_cast<const float*>(op.filters), op.outputs, epilogue);
}

inline void winograd_forward(const Conv3x3Forward& op) {
  const int64_t inputs = op.shape.channels, outputs = op.outputs;
  const Tiling tiling(op.shape, block_tiles(inputs));
  Buffer u(filter_elements(inputs, outputs));
  transform_filters(filters_of(op.weight), inputs, outputs, u.data());
  std::vector<double> moments(op.mean == nullptr ? 0 : 2 * tiling.blocks * outputs);
  double* means = op.mean == nullptr ? nullptr : moments.data();
  double* squares = op.mean == nullptr ? nullptr : means + tiling.blocks * outputs;
  const ForwardEpilogue epilogue{static_cast<float*>(op.y), outputs, means, squares};
  with_activation(op.a, inputs, [&](const auto& operand) {
    winograd_convolution(operand, tiling, inputs, u.data(), outputs, epilogue);
  });
  if (op.mean == nullptr) return;
  std::vector<int64_t> counts(tiling.blocks);
  for (int64_t block = 0; block < tiling.blocks; block++)
    counts[block] = each_pixel(tiling, block, [](int64_t) {});
  merge_moments(op, means, squares, counts);
}

inline void winograd_dgrad(const Conv3x3Dgrad& op) {
  const int64_t inputs = op.outputs, outputs = op.shape.channels;  // of this convolution: dy to da
  const Tiling tiling(op.shape, block_tiles(inputs));
  Buffer u(filter_elements(inputs, outputs));
  const int64_t* strides = op.weight.strides;
  transform_filters(
      {op.weight.data + 2 * (strides[2] + strides[3]), strides[1], strides[0], -strides[2], -strides[3]},
      inputs, outputs, u.data());
  const bool sums = op.a.norm.mean != nullptr;
  Vectors<float> vectors(3, sums ? outputs : 0, kLanes);
  std::vector<double> partial(sums ? 2 * tiling.blocks * outputs : 0);
  if (sums) fill_affine(op.a.norm, vectors, 0);
  double *sum_dz = partial.data(), *sum_dz_centred = sum_dz + (sums ? tiling.blocks * outputs : 0);
  const auto run = [&](const auto& epilogue) {
    with_gradient(op.dy, inputs, op.shape.batch * op.shape.height * op.shape.width, [&](const auto& operand) {
      winograd_convolution(operand, tiling, inputs, u.data(), outputs, epilogue);
    });
  };
  float* da = static_cast<float*>(op.da);
  const float *residual = static_cast<const float*>(op.residual), *y = static_cast<const float*>(op.a.x);
  if (!sums)
    return run(DgradEpilogue<false>{da, outputs, residual, op.residual_mask, y, &vectors, nullptr, nullptr});
  run(DgradEpilogue<true>{da, outputs, residual, op.residual_mask, y, &vectors, sum_dz, sum_dz_centred});
  float *out = static_cast<float*>(op.sum_dz), *out_xhat = static_cast<float*>(op.sum_dz_xhat);
  const float* invstd = static_cast<const float*>(op.a.norm.invstd);
  for (int64_t c = 0; c < outputs; c++) {
    double total = 0, total_centred = 0;
    for (int64_t block = 0; block < tiling.blocks; block++) {
      total += sum_dz[block * outputs + c];
      total_centred += sum_dz_centred[block * outputs + c];
    }
    out[c] = float(total);
    out_xhat[c] = float(total_centred * double(invstd[c]));
  }
}
