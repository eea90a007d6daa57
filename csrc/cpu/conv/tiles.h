// How the output of a 3x3 convolution is cut into tiles of 2x2 pixels, and these into blocks.
//
// A unit is a row of tiles of an image, or a segment of one where rows are long; a block is some consecutive
// units. Blocks depend on sizes alone, so that what is summed by block does not depend on the threads.

constexpr int64_t kBlockTiles = 8 * kRows;
constexpr int64_t kFewBlocks = 32;
constexpr int64_t kPointTiles = 256;

constexpr int kPoints = 16;  // of a transformed tile

// Tiles of a block whose transformed inputs take half of the second-level cache.
inline int64_t block_tiles(int64_t channels) {
  return std::clamp<int64_t>(cache_bytes() / 2 / (4 * kPoints * channels), 2 * kRows, kBlockTiles);
}

// Some rows of tiles of one image.
struct Run {
  int64_t image, row, rows, col, cols;
  int64_t tiles() const { return rows * cols; }
};

struct Tiling {
  int64_t batch, height, width;
  int64_t tile_rows, tile_cols, segments, units, blocks;

  explicit Tiling(const Image& shape, int64_t block_tiles)
      : batch(shape.batch), height(shape.height), width(shape.width) {
    tile_rows = (height + 1) / 2;
    tile_cols = (width + 1) / 2;
    segments = (tile_cols + block_tiles - 1) / block_tiles;
    units = batch * tile_rows * segments;
    const int64_t segment = (tile_cols + segments - 1) / segments;
    const int64_t per_block = std::max<int64_t>(1, block_tiles / segment);
    blocks = (units + per_block - 1) / per_block;
    // Few blocks, but as many for each thread of two or four.
    if (blocks > 1 && blocks < kFewBlocks) blocks = std::min(units, (blocks + 3) / 4 * 4);
  }
  int64_t begin(int64_t block) const { return units * block / blocks; }

  // Of a block, whose pixels are one range of memory where rows are not cut into segments.
  int64_t first_pixel(int64_t block) const {
    const int64_t row = begin(block) / segments;
    return std::min((row / tile_rows * height + 2 * (row % tile_rows)) * width, batch * height * width);
  }

  // Calls body(run, first tile of the run in the block) and returns the number of tiles.
  template <class Body>
  RESNET_FUSED_INLINE int64_t each_run(int64_t block, const Body& body) const {
    int64_t tiles = 0;
    const int64_t last = begin(block + 1);
    for (int64_t unit = begin(block); unit < last;) {
      const int64_t row_unit = unit / segments, segment = unit % segments;
      const int64_t image = row_unit / tile_rows, row = row_unit % tile_rows;
      const int64_t rows = segments > 1 ? 1 : std::min(tile_rows - row, last - unit);
      const int64_t col = tile_cols * segment / segments;
      const Run run{image, row, rows, col, tile_cols * (segment + 1) / segments - col};
      body(run, tiles);
      tiles += run.tiles();
      unit += rows;
    }
    return tiles;
  }
  int64_t tiles(int64_t block) const {
    return each_run(block, [](const Run&, int64_t) {});
  }
  int64_t most_tiles() const {
    int64_t most = 0;
    for (int64_t block = 0; block < blocks; block++) most = std::max(most, tiles(block));
    return most;
  }
  // Of the largest window that fill_window fills.
  int64_t window_elements() const;
};

constexpr int64_t kChannelChunk = 64;

inline int64_t Tiling::window_elements() const {
  int64_t most = 0;
  for (int64_t block = 0; block < blocks; block++)
    each_run(block, [&](const Run& run, int64_t) {
      most = std::max(most, (2 * run.rows + 2) * (2 * run.cols + 2) * kChannelChunk);
    });
  return most;
}

// The input of a run's tiles with its border of one pixel, channels [c0, c0 + kChannelChunk): rows of
// (2 * run.cols + 2) pixels. What lies outside of the image is zero: padding is padding of the operand's
// value, not of what it is computed from.
template <class Operand>
RESNET_FUSED_INLINE void fill_window(const Operand& operand, const Tiling& tiling, const Run& run, int64_t c0,
                                     int64_t channels, float* window) {
  const int64_t rows = 2 * run.rows + 2, cols = 2 * run.cols + 2;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = 2 * run.row - 1 + i;
    for (int64_t j = 0; j < cols; j++, window += kChannelChunk) {
      const int64_t col = 2 * run.col - 1 + j;
      const bool inside = row >= 0 && row < tiling.height && col >= 0 && col < tiling.width;
      const int64_t pixel = (run.image * tiling.height + row) * tiling.width + col;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int n = int(std::min<int64_t>(kLanes, channels - c));
        store(window + c, inside ? operand.at(pixel, c0 + c, n) : Vec{});
      }
    }
  }
}

// B^T d B of a 4x4 tile.
RESNET_FUSED_INLINE void transform_input(const float* tile, int64_t row_stride, Vec (&out)[kPoints]) {
  Vec t[4][4];
  RESNET_FUSED_UNROLL
  for (int j = 0; j < 4; j++) {
    const float* column = tile + j * kChannelChunk;
    const Vec d0 = load(column), d1 = load(column + row_stride), d2 = load(column + 2 * row_stride),
              d3 = load(column + 3 * row_stride);
    t[0][j] = d0 - d2;
    t[1][j] = d1 + d2;
    t[2][j] = d2 - d1;
    t[3][j] = d1 - d3;
  }
  RESNET_FUSED_UNROLL
  for (int i = 0; i < 4; i++) {
    out[4 * i] = t[i][0] - t[i][2];
    out[4 * i + 1] = t[i][1] + t[i][2];
    out[4 * i + 2] = t[i][2] - t[i][1];
    out[4 * i + 3] = t[i][1] - t[i][3];
  }
}

// A^T m A: 2x2 outputs of a transformed tile.
RESNET_FUSED_INLINE void transform_output(const float* tile, int64_t point_stride, Vec (&out)[4]) {
  Vec t[2][4];
  RESNET_FUSED_UNROLL
  for (int j = 0; j < 4; j++) {
    const float* column = tile + j * point_stride;
    const Vec m0 = load(column), m1 = load(column + 4 * point_stride), m2 = load(column + 8 * point_stride),
              m3 = load(column + 12 * point_stride);
    t[0][j] = m0 + m1 + m2;
    t[1][j] = m1 - m2 - m3;
  }
  RESNET_FUSED_UNROLL
  for (int i = 0; i < 2; i++) {
    out[2 * i] = t[i][0] + t[i][1] + t[i][2];
    out[2 * i + 1] = t[i][1] - t[i][2] - t[i][3];
  }
}
