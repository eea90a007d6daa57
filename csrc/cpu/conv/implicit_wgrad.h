// The gradient w.r.t. the weight of a convolution of any kernel, stride, padding and dilation, as an implicit
// GEMM: dW[k, tap, c] = sum over the output's pixels of dy[pixel, k] * a[pixel under the tap, c].
//
// A block of pixels at a time, dy is packed as D [group of outputs][pixel][output] and, for one tap after
// another, a as V [panel of inputs][pixel][input], both through their prologues; then D^T V is added to sums
// [output][tap][input].

// Pixels of the output in a block.
constexpr int64_t kBlockPixels = 128;
// Of packed operands: a row more, so that a pixel's panels don't fall into one set of the cache.
constexpr int64_t kGroupStride = (kBlockPixels + 1) * kLanes, kPanelStride = (kBlockPixels + 1) * kPanel;
// Up to which sums are taken over parts of the batch, for a thread each.
constexpr int64_t kPartsBytes = 1 << 21;
// Outputs of a task, at least: with fewer, packing a counts.
constexpr int64_t kTaskOutputs = 64;

// Channels [first, last) of a pixel, in panels of kWidth; zeros where it is padding, and beyond the last one.
template <int kWidth, int64_t kStride, class Operand>
RESNET_FUSED_INLINE void pack_pixel(const Operand& operand, int64_t pixel, int64_t first, int64_t last,
                                    float* to) {
  int64_t c = first;
  for (; c + kWidth <= last; c += kWidth, to += kStride) RESNET_FUSED_UNROLL
  for (int i = 0; i < kWidth; i += kLanes)
    store(to + i, pixel < 0 ? Vec{} : operand.at(pixel, c + i, kLanes));
  if (c == last) return;
  for (int i = 0; i < kWidth; i += kLanes) {
    const int n = int(std::clamp<int64_t>(last - c - i, 0, kLanes));
    store(to + i, pixel < 0 || n == 0 ? Vec{} : operand.at(pixel, c + i, n));
  }
}

// The input's pixels under a tap, for pixels [first, first + count) of the output; -1 is padding.
inline void pixels_under_tap(const ConvWgrad& op, int64_t tap, int64_t first, int64_t count,
                             int64_t* pixels) {
  const int64_t down = tap / op.kernel[1] * op.dilation[0] - op.padding[0];
  const int64_t right = tap % op.kernel[1] * op.dilation[1] - op.padding[1];
  int64_t col = first % op.width, row = first / op.width % op.height, image = first / op.width / op.height;
  for (int64_t i = 0; i < count; i++) {
    const int64_t y = row * op.stride[0] + down, x = col * op.stride[1] + right;
    const bool inside = y >= 0 && y < op.shape.height && x >= 0 && x < op.shape.width;
    pixels[i] = inside ? (image * op.shape.height + y) * op.shape.width + x : -1;
    if (++col < op.width) continue;
    col = 0;
    if (++row < op.height) continue;
    row = 0;
    image++;
  }
}

// Sizes, and how the work is cut: parts of the pixels, whose sums are added up in the end, times ranges of
// the outputs, as many tasks for each thread. Parts depend on sizes alone, so that no sum depends on the
// number of threads.
struct WgradTasks {
  int64_t inputs, outputs, taps, panels, groups, row_size, sums_size, pixels, blocks, parts, ranges;

  explicit WgradTasks(const ConvWgrad& op)
      : inputs(op.shape.channels),
        outputs(op.outputs),
        taps(op.kernel[0] * op.kernel[1]),
        panels((inputs + kPanel - 1) / kPanel),
        groups((outputs + kLanes - 1) / kLanes),
        row_size(taps * panels * kPanel),
        sums_size(groups * kLanes * row_size),
        pixels(op.shape.batch * op.height * op.width),
        blocks((pixels + kBlockPixels - 1) / kBlockPixels) {
    parts = 1;
    while (2 * parts <= std::min(blocks, kParts) && 2 * parts * sums_size * 4 <= kPartsBytes) parts *= 2;
    const int64_t threads = num_threads(), most = (groups * kLanes + kTaskOutputs - 1) / kTaskOutputs;
    ranges = parts % threads == 0 ? 1 : std::min(threads, most);
  }
  int64_t first_pixel(int64_t block) const { return pixels * block / blocks; }
};

template <class A, class Dy>
void implicit_wgrad(const ConvWgrad& op, const A& a, const Dy& dy) {
  const WgradTasks at(op);
  const int64_t input_pixels = op.shape.batch * op.shape.height * op.shape.width;
  Buffer sums(at.parts * at.sums_size);
  std::vector<double> dy_sums(op.sum_dy == nullptr ? 0 : at.parts * at.groups * kLanes);
  parallel_for_dynamic(at.parts * at.ranges, [&](int64_t task) {
    const int64_t part = task / at.ranges, range = task % at.ranges;
    const int64_t first_group = at.groups * range / at.ranges;
    const int64_t range_groups = at.groups * (range + 1) / at.ranges - first_group;
    const int64_t first_output = first_group * kLanes;
    const int64_t last_output = std::min(at.outputs, first_output + range_groups * kLanes);
    float *d = scratch(range_groups * kGroupStride + at.panels * kPanelStride),
          *v = d + range_groups * kGroupStride;
    float* part_sums = sums.data() + part * at.sums_size + first_output * at.row_size;
    const int64_t first_block = at.blocks * part / at.parts, last_block = at.blocks * (part + 1) / at.parts;
    for (int64_t block = first_block; block < last_block; block++) {
      const int64_t begin = at.first_pixel(block), count = at.first_pixel(block + 1) - begin;
      for (int64_t i = 0; i < count; i++)
        pack_pixel<kLanes, kGroupStride>(dy, begin + i, first_output, last_output, d + i * kLanes);
      if (op.sum_dy != nullptr)
        for (int64_t group = 0; group < range_groups; group++) {
          Vec sum{};
          for (int64_t i = 0; i < count; i++) sum += load(d + group * kGroupStride + i * kLanes);
          double* to = dy_sums.data() + (part * at.groups + first_group + group) * kLanes;
          for (int lane = 0; lane < kLanes; lane++) to[lane] += double(sum[lane]);
        }
      // GEMMs leave the memory idle: the next block finds its lines in the cache.
      const int64_t next = block + 1 < last_block ? begin + count : at.pixels,
                    slots = at.taps * at.panels * range_groups;
      const int64_t ahead = block + 1 < last_block ? at.first_pixel(block + 2) - next : 0;
      for (int64_t tap = 0; tap < at.taps; tap++) {
        int64_t pixels[kBlockPixels];
        pixels_under_tap(op, tap, begin, count, pixels);
        for (int64_t i = 0; i < count; i++)
          pack_pixel<kPanel, kPanelStride>(a, pixels[i], 0, at.inputs, v + i * kPanel);
        for (int64_t step = 0; step < at.panels * range_groups; step++) {
          const int64_t panel = step / range_groups, group = step % range_groups;
          const int64_t slot = tap * at.panels * range_groups + step;
          const int64_t from = next + ahead * slot / slots, to = next + ahead * (slot + 1) / slots;
          dy.prefetch(from, to);
          a.prefetch(from * input_pixels / at.pixels, to * input_pixels / at.pixels);
          for (int64_t k = 0; k < kLanes; k += kGradRows)
            gemm_tn(d + group * kGroupStride + k, v + panel * kPanelStride, count, block > first_block,
                    part_sums + (group * kLanes + k) * at.row_size + (tap * at.panels + panel) * kPanel,
                    at.row_size);
        }
      }
    }
  });
  float* dweight = static_cast<float*>(op.dweight);
  parallel_for_dynamic(at.outputs, [&](int64_t k) {
    for (int64_t tap = 0; tap < at.taps; tap++)
      for (int64_t c = 0; c < at.inputs; c += kLanes) {
        const float* from = sums.data() + k * at.row_size + tap * at.panels * kPanel + c;
        Vec sum = at.blocks == 0 ? Vec{} : load(from);
        for (int64_t part = 1; part < at.parts; part++) sum += load(from + part * at.sums_size);
        store(dweight + (k * at.taps + tap) * at.inputs + c, sum,
              int(std::min<int64_t>(kLanes, at.inputs - c)));
      }
  });
  if (op.sum_dy == nullptr) return;
  for (int64_t k = 0; k < at.outputs; k++) {
    double sum = 0;
    for (int64_t part = 0; part < at.parts; part++) sum += dy_sums[part * at.groups * kLanes + k];
    static_cast<float*>(op.sum_dy)[k] = float(sum);
  }
}

inline void implicit_wgrad(const ConvWgrad& op) {
  with_activation(op.a, op.shape.channels, [&](const auto& a) {
    with_gradient(op.dy, op.outputs, op.shape.batch * op.height * op.width,
                  [&](const auto& dy) { implicit_wgrad(op, a, dy); });
  });
}
