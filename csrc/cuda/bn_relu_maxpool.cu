// Launches the stem's kernels: max-pooling of relu(bn(y)), its sums and its backward.
#include "bn_relu_maxpool.cuh"

namespace resnet_fused::cuda {
namespace {

bool is_empty(const Image& y) { return y.batch == 0 || y.channels == 0 || y.height == 0 || y.width == 0; }

void check_extents(const Image& y) {
  if (y.height > (int64_t{1} << 30) || y.width > (int64_t{1} << 30)) {
    throw std::runtime_error("resnet_fused: bn_relu_maxpool takes heights and widths up to 2^30");
  }
}

// Threads of a block along a line of `width` pixels of the image (channels_last), or over a plane of
// `height` x `width` pixels (contiguous).
dim3 columns_block(const Tiles& tiles, int64_t width) {
  return dim3(tiles.width, static_cast<unsigned>(split_evenly(width, kThreads / tiles.width).width));
}
dim3 planes_block(int64_t height, int64_t width) {
  const int x = split_evenly(width, kThreads).width;
  return dim3(x, static_cast<unsigned>(split_evenly(height, kThreads / x).width));
}

template <typename T, class Op, class Vector, class Scalar, class Planes>
void launch_pool(const char* name, const Op& op, const Image& y, bool pooled, bool vector, Launch where,
                 Vector vector_kernel, Scalar scalar_kernel, Planes planes_kernel) {
  const int64_t height = pooled ? y.pooled_height() : y.height, width = pooled ? y.pooled_width() : y.width;
  if (!y.channels_last) {
    launch(name, planes_kernel, make_grid(y.batch * y.channels, 1), planes_block(height, width), where.stream,
           op, PoolShape(y));
    return;
  }
  const Tiles tiles = split_evenly(ceil_div(y.channels, kLanes), 32);
  const int64_t lines = y.batch * height;
  const dim3 grid = make_grid(ceil_div(lines, pieces_per_block(lines * tiles.count)), tiles.count);
  const auto run = [&](auto kernel) {
    launch(name, kernel, grid, columns_block(tiles, width), where.stream, op, PoolShape(y), tiles.count);
  };
  vector ? run(vector_kernel) : run(scalar_kernel);
}

template <typename T>
bool can_use_vectors(int64_t channels, const void* a, const void* b, const void* c, const uint8_t* indices) {
  return kHasVectorPath<T> && channels % kLanes == 0 && aligned_to(a, 16) && aligned_to(b, 16) &&
         aligned_to(c, 16) && aligned_to(indices, 8);
}

}  // namespace

void bn_relu_maxpool(const BnReluMaxpool& p, Launch where) {
  if (is_empty(p.shape)) return;
  check_extents(p.shape);
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr bool kVector = kHasVectorPath<T>;
    const PoolForward<T> op{static_cast<const T*>(p.y), static_cast<T*>(p.out), p.indices,
                            NormVectors<Stat<T>>(p.norm)};
    const bool vector = can_use_vectors<T>(p.shape.channels, p.y, p.out, nullptr, p.indices);
    launch_pool<T>("bn_relu_maxpool", op, p.shape, true, vector, where, &pool_columns_kernel<T, kVector>,
                   &pool_columns_kernel<T, false>, &pool_planes_kernel<T>);
  });
}

void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& p, Launch where) {
  const Image& y = p.shape;
  if (y.channels == 0) return;
  check_extents(y);
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    constexpr bool kVector = kHasVectorPath<T>;
    constexpr const char* kName = "bn_relu_maxpool_backward_reduce";
    S* partials = static_cast<S*>(where.workspace);
    const Totals<S, 2> totals{{static_cast<S*>(p.sum_dz), static_cast<S*>(p.sum_dz_xhat)},
                              {nullptr, static_cast<const S*>(p.norm.invstd)}};
    if (is_empty(y)) return launch_merge_sums(kName, totals, y.channels, 0, where);

    const PoolReduce<T> op{static_cast<const T*>(p.grad), p.indices, static_cast<const T*>(p.y),
                           static_cast<const S*>(p.norm.mean)};
    // The chunks are lines of windows (channels_last) or whole images.
    const int64_t wanted = y.channels_last ? max_chunks(y.channels) : kReduceBlocks / y.channels;
    const int64_t chunks =
        std::clamp<int64_t>(wanted, 1, y.channels_last ? y.batch * y.pooled_height() : y.batch);
    if (y.channels_last) {
      const Tiles tiles = split_evenly(ceil_div(y.channels, kLanes), kReduceTile);
      const auto run = [&](auto kernel) {
        launch(kName, kernel, make_grid(chunks, tiles.count), columns_block(tiles, y.pooled_width()),
               where.stream, op, PoolShape(y), tiles.count, partials);
      };
      const bool vector = can_use_vectors<T>(y.channels, p.grad, p.y, nullptr, p.indices);
      vector ? run(&pool_reduce_columns_kernel<T, kVector>) : run(&pool_reduce_columns_kernel<T, false>);
    } else {
      launch(kName, &pool_reduce_planes_kernel<T>, make_grid(chunks, y.channels),
             planes_block(y.pooled_height(), y.pooled_width()), where.stream, op, PoolShape(y), partials);
    }
    launch_merge_sums(kName, totals, y.channels, chunks, where);
  });
}

void bn_relu_maxpool_backward(const BnReluMaxpoolBackward& p, Launch where) {
  if (is_empty(p.shape)) return;
  check_extents(p.shape);
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr bool kVector = kHasVectorPath<T>;
    const int64_t pixels = p.shape.batch * p.shape.height * p.shape.width;
    const PoolBackward<T> op{static_cast<const T*>(p.grad), p.indices, static_cast<const T*>(p.y),
                             static_cast<T*>(p.dy), GradientVectors<Stat<T>>(p.norm, p.sums, pixels)};
    const bool vector = can_use_vectors<T>(p.shape.channels, p.grad, p.y, p.dy, p.indices);
    launch_pool<T>("bn_relu_maxpool_backward", op, p.shape, false, vector, where,
                   &pool_backward_columns_kernel<T, kVector>, &pool_backward_columns_kernel<T, false>,
                   &pool_backward_planes_kernel<T>);
  });
}

}  // namespace resnet_fused::cuda
