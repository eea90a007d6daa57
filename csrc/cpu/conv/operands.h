// The values of lazy operands, computed while a tile is loaded.

RESNET_FUSED_INLINE void prefetch_range(const float* first, const float* last) {
  for (; first < last; first += 16) __builtin_prefetch(first, 0, 2);
}

// x as it is.
struct Plain {
  const float* x;
  int64_t channels;

  explicit Plain(const float* x, int64_t channels) : x(x), channels(channels) {}
  RESNET_FUSED_INLINE void prefetch(int64_t first, int64_t last) const {
    prefetch_range(x + first * channels, x + last * channels);
  }
  RESNET_FUSED_INLINE Vec at(int64_t pixel, int64_t c, int n) const {
    return load(x + pixel * channels + c, n);
  }
};

// relu((x - mean) * scale + bias)
struct BnReluOf {
  const float* x;
  int64_t channels;
  Vectors<float> vectors;

  BnReluOf(const LazyActivation& a, int64_t channels)
      : x(static_cast<const float*>(a.x)), channels(channels), vectors(3, channels, kLanes) {
    fill_affine(a.norm, vectors, 0);
  }
  RESNET_FUSED_INLINE void prefetch(int64_t first, int64_t last) const {
    prefetch_range(x + first * channels, x + last * channels);
  }
  RESNET_FUSED_INLINE Vec at(int64_t pixel, int64_t c, int n) const {
    const Vec mean = load(vectors[0] + c), scale = load(vectors[1] + c), bias = load(vectors[2] + c);
    return relu((load(x + pixel * channels + c, n) - mean) * scale + bias);
  }
};

// The gradient w.r.t. the input of a batch norm, scale * (dz + (y - mean) * slope + offset), or dz alone.
//   kMasked     dz = g where the mask has a bit; else, with a batch norm, g where relu(bn(y)) lets it through
//   kNorm       there is a batch norm
//   kBatch      its statistics are the batch's
template <bool kMasked, bool kNorm, bool kBatch>
struct GradientOf {
  const float *g, *y;
  const uint8_t* mask;
  int64_t channels, mask_stride;
  Vectors<float> vectors;

  GradientOf(const LazyGradient& dy, int64_t channels, int64_t pixels)
      : g(static_cast<const float*>(dy.g)),
        y(static_cast<const float*>(dy.y)),
        mask(dy.mask),
        channels(channels),
        mask_stride((channels + 7) / 8),
        vectors(5, channels, kLanes) {
    if (kNorm) fill_affine(dy.norm, vectors, 0);
    if (kBatch) fill_backward(dy.norm, dy.sums, pixels, vectors, 3);
  }
  RESNET_FUSED_INLINE void prefetch(int64_t first, int64_t last) const {
    prefetch_range(g + first * channels, g + last * channels);
    if (kBatch || (kNorm && !kMasked)) prefetch_range(y + first * channels, y + last * channels);
  }
  RESNET_FUSED_INLINE Vec at(int64_t pixel, int64_t c, int n) const {
    Vec dz = load(g + pixel * channels + c, n);
    if (kMasked) dz = mask_lanes(mask + pixel * mask_stride, c, n) ? dz : Vec{};
    if (!kNorm) return dz;
    const Vec scale = load(vectors[1] + c);
    Vec centred{};
    if (kBatch || !kMasked) centred = load(y + pixel * channels + c, n) - load(vectors[0] + c);
    if (!kMasked) dz = centred * scale + load(vectors[2] + c) <= 0 ? Vec{} : dz;
    return kBatch ? scale * (dz + (centred * load(vectors[3] + c) + load(vectors[4] + c))) : scale * dz;
  }
};

template <class Body>
void with_activation(const LazyActivation& a, int64_t channels, const Body& body) {
  if (a.norm.mean == nullptr) return body(Plain(static_cast<const float*>(a.x), channels));
  body(BnReluOf(a, channels));
}

template <class Body>
void with_gradient(const LazyGradient& dy, int64_t channels, int64_t pixels, const Body& body) {
  const bool batch = has_sums(dy.sums);
  if (dy.norm.mean == nullptr) {
    if (dy.mask == nullptr) return body(Plain(static_cast<const float*>(dy.g), channels));
    return body(GradientOf<true, false, false>(dy, channels, pixels));
  }
  if (dy.mask == nullptr) {
    if (batch) return body(GradientOf<false, true, true>(dy, channels, pixels));
    return body(GradientOf<false, true, false>(dy, channels, pixels));
  }
  if (batch) return body(GradientOf<true, true, true>(dy, channels, pixels));
  body(GradientOf<true, true, false>(dy, channels, pixels));
}
