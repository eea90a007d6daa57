// Mean and biased variance of each channel, by Welford's and Chan's formulas: a sum of squares would lose the
// variance where |mean| >> std. The partial results are (count, mean, M2), M2 = sum of (x - mean)^2.
#include "reduce.cuh"

namespace resnet_fused::cuda {
namespace {

template <typename S>
struct Moments {
  S count, mean, m2;

  // Chan: the moments of two sets together. An empty set changes nothing.
  __device__ void merge(const Moments& other) {
    const S total = count + other.count;
    if (!(total > S(0))) return;
    const S share = other.count / total, delta = other.mean - mean;
    mean = multiply_add(delta, share, mean);
    m2 += other.m2 + delta * (delta * (count * share));
    count = total;
  }
};

// A pack's own mean is taken relative to one of its elements, so that equal elements have no variance at all.
template <typename T, bool kVector>
__device__ Moments<Stat<T>> moments_of_lanes(const Lanes<T, kVector>& lanes, const Columns<kVector>& at) {
  using S = Stat<T>;
  const S origin = lanes.get(0);
  S count = kVector ? S(kLanes) : S(0), sum = 0, m2 = 0;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    if (!at.has(j)) continue;
    if constexpr (!kVector) count += S(1);
    sum += lanes.get(j) - origin;
  }
  const S mean = origin + sum / count;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    if (!at.has(j)) continue;
    const S d = lanes.get(j) - mean;
    m2 = multiply_add(d, d, m2);
  }
  return {count, mean, m2};
}

// partials[chunk][count, mean, M2][channel]
template <typename S>
__device__ void store_partial(const Moments<S>& moments, int64_t channels, int64_t channel, S* partials) {
  S* to = partials + blockIdx.x * int64_t{3} * channels + channel;
  to[0] = moments.count;
  to[channels] = moments.mean;
  to[2 * channels] = moments.m2;
}

// Each thread runs Welford down its eight columns, then the block merges its rows pairwise.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    stats_columns_kernel(const T* x, Matrix shape, int64_t tiles, Stat<T>* partials) {
  using S = Stat<T>;
  constexpr int kBatch = kVector ? (sizeof(T) == 2 ? 4 : 2) : 1;
  __shared__ S counts[kThreads];
  __shared__ S means[kLanes][kThreads];
  __shared__ S m2s[kLanes][kThreads];
  const int width = blockDim.x, thread = threadIdx.y * width + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.y;

  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const Columns<kVector> at(tile, shape.cols);
    S count = 0, mean[kLanes] = {}, m2[kLanes] = {};
    const int64_t first_row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    for (int64_t row = first_row; row < shape.rows && at.any(); row += kBatch * step) {
      Lanes<T, kVector> in[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row + b * step < shape.rows) in[b].load(x + (row + b * step) * shape.cols, at);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row + b * step >= shape.rows) continue;
        count += S(1);
        const S share = S(1) / count;
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const S v = in[b].get(j), delta = v - mean[j];
          mean[j] = multiply_add(delta, share, mean[j]);
          m2[j] = multiply_add(delta, v - mean[j], m2[j]);
        }
      }
    }

    counts[thread] = count;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) means[j][thread] = mean[j], m2s[j][thread] = m2[j];
    __syncthreads();
    for (int rows = blockDim.y; rows > 1;) {
      const int half = (rows + 1) / 2, other = thread + half * width;
      if (static_cast<int>(threadIdx.y) + half < rows) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          Moments<S> mine{counts[thread], means[j][thread], m2s[j][thread]};
          mine.merge({counts[other], means[j][other], m2s[j][other]});
          means[j][thread] = mine.mean, m2s[j][thread] = mine.m2;
        }
        counts[thread] += counts[other];
      }
      rows = half;
      __syncthreads();
    }
    if (threadIdx.y == 0) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (!at.has(j)) continue;
        store_partial<S>({counts[thread], means[j][thread], m2s[j][thread]}, shape.cols, at[j], partials);
      }
    }
    __syncthreads();
  }
}

// A thread's eight elements belong to one channel here.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    stats_planes_kernel(const T* x, Matrix shape, int64_t tiles, Stat<T>* partials) {
  using S = Stat<T>;
  constexpr int kBatch = kVector ? (sizeof(T) == 2 ? 4 : 2) : 1;
  __shared__ Moments<S> scratch[kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t images = shape.rows / shape.channels, row_blocks = ceil_div(images, blockDim.y);

  for (int64_t channel = blockIdx.y; channel < shape.channels; channel += gridDim.y) {
    Moments<S> moments{0, 0, 0};
    PlaneWalk walk(blockIdx.x, gridDim.x, tiles);
    while (walk.row_block < row_blocks) {
      Lanes<T, kVector> in[kBatch];
      PlaneWalk ahead = walk;
#pragma unroll
      for (int b = 0; b < kBatch; ++b, ahead.advance()) {
        const int64_t image = ahead.row_block * blockDim.y + threadIdx.y;
        const Columns<kVector> at(ahead.tile, shape.cols);
        if (image < images && at.any()) in[b].load(x + (image * shape.channels + channel) * shape.cols, at);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b, walk.advance()) {
        const int64_t image = walk.row_block * blockDim.y + threadIdx.y;
        const Columns<kVector> at(walk.tile, shape.cols);
        if (image < images && at.any()) moments.merge(moments_of_lanes<T, kVector>(in[b], at));
      }
    }

    scratch[thread] = moments;
    __syncthreads();
    for (int count = blockDim.x * blockDim.y; count > 1;) {
      const int half = (count + 1) / 2;
      if (thread + half < count) scratch[thread].merge(scratch[thread + half]);
      count = half;
      __syncthreads();
    }
    if (thread == 0) store_partial<S>(scratch[0], shape.channels, channel, partials);
    __syncthreads();
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    merge_stats_kernel(const S* partials, int64_t channels, int64_t chunks, double eps, S* mean, S* var,
                       S* invstd) {
  __shared__ Moments<double> scratch[kMergeLanes][kMergeChannels];
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x;
  Moments<double> moments{0, 0, 0};
  if (channel < channels) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kMergeLanes) {
      const S* from = partials + chunk * 3 * channels + channel;
      moments.merge({from[0], from[channels], from[2 * channels]});
    }
  }
  scratch[threadIdx.y][threadIdx.x] = moments;
  __syncthreads();
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.y) < half) {
      scratch[threadIdx.y][threadIdx.x].merge(scratch[threadIdx.y + half][threadIdx.x]);
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && channel < channels) {
    const Moments<double> total = scratch[0][threadIdx.x];
    const double variance = total.count > 0 ? total.m2 / total.count : 0.0;
    mean[channel] = static_cast<S>(total.mean);
    var[channel] = static_cast<S>(variance);
    invstd[channel] = static_cast<S>(1.0 / sqrt(variance + eps));
  }
}

}  // namespace

int64_t reduce_workspace_bytes(const Matrix& shape, Dtype dtype) {
  const int64_t size = dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  return max_chunks(shape.channels) * kMaxSums * shape.channels * size;
}

void batch_norm_stats(const BatchNormStats& p, Launch where) {
  const Matrix& shape = p.shape;
  if (shape.channels == 0) return;
  dispatch(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using S = Stat<T>;
    const T* x = static_cast<const T*>(p.x);
    S* partials = static_cast<S*>(where.workspace);
    int64_t chunks = 0;
    if (shape.rows != 0 && shape.cols != 0) {
      const ReducePlan plan = plan_reduce(shape);
      chunks = plan.chunks;
      const dim3 grid = make_grid(chunks, shape.channels_last ? plan.tiles.count : shape.channels);
      const bool vector = kHasVectorPath<T> && shape.cols % kLanes == 0 && aligned_to(x, 16);
      const auto run = [&](auto kernel) {
        launch("batch_norm_stats", kernel, grid, plan.block(), where.stream, x, shape, plan.tiles.count,
               partials);
      };
      if constexpr (kHasVectorPath<T>) {
        if (vector)
          shape.channels_last ? run(&stats_columns_kernel<T, true>) : run(&stats_planes_kernel<T, true>);
      }
      if (!vector)
        shape.channels_last ? run(&stats_columns_kernel<T, false>) : run(&stats_planes_kernel<T, false>);
    }
    const dim3 grid(static_cast<unsigned>(ceil_div(shape.channels, kMergeChannels)));
    launch("batch_norm_stats_merge", &merge_stats_kernel<S>, grid, dim3(kMergeChannels, kMergeLanes),
           where.stream, static_cast<const S*>(partials), shape.channels, chunks, p.eps,
           static_cast<S*>(p.mean), static_cast<S*>(p.var), static_cast<S*>(p.invstd));
  });
}

}  // namespace resnet_fused::cuda
