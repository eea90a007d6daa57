// How an activation is cut up for the kernels: into panels, row-major matrices of rows x lanes in which every
// lane (column) has its own coefficients. Both layouts look the same from inside a kernel:
//   channels_last: the tensor is one run of elements; lanes are the channels, or several pixels' channels
//   when there
//                  are few;
//   contiguous:    every plane is a run; up to kPlaneLanes lanes, all of the same channel.
// What a run leaves over is a last panel with one row and fewer lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "element.h"
#include "norm.h"
#include "parallel.h"

namespace resnet_fused::cpu {

constexpr int64_t kPlaneLanes = 64;
// A tile's sums are taken in the statistics type, tiles are added in double.
constexpr int64_t kTileRows = 32;
// So that a tile's accumulators stay in the first-level cache.
constexpr int64_t kTileLanes = 512;
// Below this a thread costs more than it brings.
constexpr int64_t kTaskElements = 1 << 14;
constexpr int64_t kReduceTasks = 32;
// Of a reduction, so that merging the tasks costs little beside them.
constexpr int64_t kTaskRows = 4 * kTileRows;

template <class S>
struct Panel {
  int64_t element, mask_byte;  // where the panel starts
  int64_t rows, lanes;
  int64_t stride, mask_stride;  // from row to row
  const S* vectors;
  int64_t vector_stride;

  const S* vector(int k) const { return vectors + k * vector_stride; }
  int64_t at(int64_t row, int64_t lane) const { return element + row * stride + lane; }
  int64_t mask_at(int64_t row, int64_t lane) const { return mask_byte + row * mask_stride + lane / 8; }
};

struct Runs {
  bool channels_last;
  int64_t count, length, mask_bytes;
  int64_t lanes, channels;

  Runs(const Matrix& shape, bool has_mask) : channels_last(shape.channels_last), channels(shape.channels) {
    count = channels_last ? 1 : shape.rows;
    length = channels_last ? shape.rows * shape.cols : shape.cols;
    mask_bytes = channels_last ? shape.rows * shape.mask_bytes_per_row() : shape.mask_bytes_per_row();
    // A mask row starts on a byte, so pixels are put side by side only where that leaves no gap.
    const bool foldable =
        channels_last && 0 < channels && channels < kPlaneLanes && (!has_mask || channels % 8 == 0);
    lanes = !channels_last ? std::min(kPlaneLanes, length)
            : foldable     ? kPlaneLanes / channels * channels
                           : channels;
  }

  bool empty() const { return count * length == 0; }
  int64_t full_rows() const { return length / lanes; }
  int64_t mask_stride() const { return (lanes + 7) / 8; }

  template <class S>
  Panel<S> panel(int64_t run, int64_t row, int64_t rows, int64_t lane, int64_t lane_count, const S* vectors,
                 int64_t vector_stride) const {
    return {run * length + row * lanes + lane,
            run * mask_bytes + row * mask_stride() + lane / 8,
            rows,
            lane_count,
            lanes,
            mask_stride(),
            vectors + lane,
            vector_stride};
  }
};

// The per-channel vectors laid out by lane: repeated for every pixel of a folded row.
template <class S>
std::vector<S> lanes_of(const Runs& runs, const Vectors<S>& vectors) {
  std::vector<S> lanes(vectors.count() * runs.lanes);
  for (int k = 0; k < vectors.count(); k++)
    for (int64_t lane = 0; lane < runs.lanes; lane += runs.channels)
      std::copy_n(vectors[k], runs.channels, lanes.data() + k * runs.lanes + lane);
  return lanes;
}

// One channel's values spread over the lanes of a plane.
template <class S>
void spread(const Runs& runs, const Vectors<S>& vectors, int64_t run, S* lanes) {
  for (int k = 0; k < vectors.count(); k++)
    std::fill_n(lanes + k * kPlaneLanes, runs.lanes, vectors[k][run % runs.channels]);
}

constexpr int kMaxVectors = 8;

// Eight sums side by side, so that an addition need not wait for the one before it.
inline double sum_of(const double* values, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; j++) sums[j] += values[i + j];
  for (; i < count; i++) sums[0] += values[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// body(panel) for panels that cover the tensor, each element once.
template <class S, class Body>
void for_each_panel(const Runs& runs, const Vectors<S>& vectors, const Body& body) {
  if (runs.empty()) return;
  const int64_t full = runs.full_rows(), rest = runs.length % runs.lanes;
  const int64_t units = runs.channels_last ? std::max<int64_t>(full, 1) : runs.count;
  const int64_t useful = (runs.count * runs.length + kTaskElements - 1) / kTaskElements;
  const int64_t tasks = std::min({units, useful, int64_t(num_threads())});
  std::vector<S> lanes;
  if (runs.channels_last) lanes = lanes_of(runs, vectors);
  parallel_for(tasks, [&](int64_t task) {
    const int64_t begin = units * task / tasks, end = units * (task + 1) / tasks;
    if (runs.channels_last) {
      const int64_t rows = std::min(end, full) - begin;
      if (rows > 0) body(runs.panel(0, begin, rows, 0, runs.lanes, lanes.data(), runs.lanes));
      if (task == tasks - 1 && rest > 0) body(runs.panel(0, full, 1, 0, rest, lanes.data(), runs.lanes));
      return;
    }
    S spread_lanes[kMaxVectors * kPlaneLanes];
    for (int64_t run = begin; run < end; run++) {
      spread(runs, vectors, run, spread_lanes);
      if (full > 0) body(runs.panel(run, 0, full, 0, runs.lanes, spread_lanes, kPlaneLanes));
      if (rest > 0) body(runs.panel(run, full, 1, 0, rest, spread_lanes, kPlaneLanes));
    }
  });
}

// body(task) for every task of a reduction. A thread takes its tasks from the last to the first: the end of
// what the operator before wrote is still in the cache, and when this is done the beginning is, which is
// where the same thread starts the elementwise pass that follows.
template <class Body>
void for_each_backwards(int64_t tasks, const Body& body) {
  const int64_t threads = std::min(tasks, int64_t(num_threads()));
  parallel_for(threads, [&](int64_t thread) {
    const int64_t first = tasks * thread / threads;
    for (int64_t task = tasks * (thread + 1) / threads - 1; task >= first; task--) body(task);
  });
}

// The tasks of a reduction: full rows where lanes are channels, planes otherwise. How the tensor is cut
// depends on its shape alone, never on the number of threads, and so does the result.
class ReduceTasks {
 public:
  explicit ReduceTasks(const Runs& runs) {
    rows_ = !runs.channels_last ? runs.count : runs.empty() ? 0 : runs.full_rows();
    step_ = runs.channels_last ? kTaskRows : 1;
    const int64_t useful = (runs.count * runs.length + kTaskElements - 1) / kTaskElements;
    count_ = std::max<int64_t>(1, std::min({steps(), useful, kReduceTasks}));
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t task) const { return std::min(steps() * task / count_ * step_, rows_); }
  int64_t end(int64_t task) const { return begin(task + 1); }

  template <class Body>
  void each(const Body& body) const {
    for_each_backwards(count_, body);
  }

 private:
  int64_t steps() const { return (rows_ + step_ - 1) / step_; }
  int64_t rows_, step_, count_;
};

// Sums over the pixels of a channel. body(panel, sums) adds the panel's column sums to sums[o * panel.stride
// + lane] for o in [0, kSums). finish(o, totals) gets the `channels` totals of sum o.
template <int kSums, class S, class Body, class Finish>
void sum_panels(const Runs& runs, const Vectors<S>& vectors, const Body& body, const Finish& finish) {
  const ReduceTasks tasks(runs);
  // Partial sums: of a task's lanes where these are channels, of a plane otherwise.
  const int64_t width = runs.channels_last ? runs.lanes : 1;
  const int64_t slots = runs.channels_last ? tasks.count() : runs.count;
  std::vector<double> partial(slots * kSums * width);
  if (!runs.empty()) {
    const int64_t full = runs.full_rows(), rest = runs.length % runs.lanes;
    const std::vector<S> lanes = runs.channels_last ? lanes_of(runs, vectors) : std::vector<S>();
    tasks.each([&](int64_t task) {
      const int64_t begin = tasks.begin(task), end = tasks.end(task);
      if (runs.channels_last) {
        double* sums = partial.data() + task * kSums * width;
        if (end > begin) body(runs.panel(0, begin, end - begin, 0, width, lanes.data(), width), sums);
        if (task == tasks.count() - 1 && rest > 0)
          body(runs.panel(0, full, 1, 0, rest, lanes.data(), width), sums);
        return;
      }
      S spread_lanes[kMaxVectors * kPlaneLanes];
      for (int64_t run = begin; run < end; run++) {
        spread(runs, vectors, run, spread_lanes);
        double sums[kSums * kPlaneLanes] = {};
        if (full > 0) body(runs.panel(run, 0, full, 0, runs.lanes, spread_lanes, kPlaneLanes), sums);
        if (rest > 0) body(runs.panel(run, full, 1, 0, rest, spread_lanes, kPlaneLanes), sums);
        for (int o = 0; o < kSums; o++) partial[run * kSums + o] = sum_of(sums + o * runs.lanes, runs.lanes);
      }
    });
  }
  std::vector<double> totals(runs.channels);
  for (int o = 0; o < kSums; o++) {
    std::fill(totals.begin(), totals.end(), 0.0);
    for (int64_t slot = 0; slot < slots; slot++) {
      const double* addend = partial.data() + (slot * kSums + o) * width;
      if (!runs.channels_last) totals[slot % runs.channels] += addend[0];
      for (int64_t lane = 0; runs.channels_last && lane < width; lane += runs.channels)
        for (int64_t channel = 0; channel < runs.channels; channel++)
          totals[channel] += addend[lane + channel];
    }
    finish(o, totals.data());
  }
}

// Where reduce_panels() leaves a sum: `channels` values in the statistics type, each times its factor if
// there is one.
struct Sum {
  void* values;
  const void* factor;
};

template <int kSums, class S, class Body>
void reduce_panels(const Runs& runs, const Vectors<S>& vectors, const Body& body, const Sum (&out)[kSums]) {
  sum_panels<kSums>(runs, vectors, body, [&](int o, const double* totals) {
    const S* factor = static_cast<const S*>(out[o].factor);
    for (int64_t channel = 0; channel < runs.channels; channel++) {
      const double sum = totals[channel];
      static_cast<S*>(out[o].values)[channel] =
          S(factor && !runs.empty() ? sum * double(factor[channel]) : sum);
    }
  });
}

}  // namespace resnet_fused::cpu
