// Mean and variance of every channel, without a sum of squares that would cancel where |mean| >> std.
//
// A tile's values are taken relative to the running mean, s1 = sum (x - m) and s2 = sum (x - m)^2 in the
// statistics type, and the tile is merged into the running mean and M2 in double (Chan et al.). What s2 -
// s1^2/n cancels is no larger than what the merge adds to M2 for that tile, so the result is as good as two
// passes over the tile at the price of one. The first tile of a task is gone through twice: it has to find
// its own m. Means are sums of two doubles, so that double activations lose no more than others do.
#include <cmath>

#include "blocks.h"

namespace resnet_fused::cpu {
namespace {

// mean + low += addend, to about twice the digits of a double (Knuth's exact sum).
RESNET_FUSED_INLINE void add_to_mean(double& mean, double& low, double addend) {
  const double small = low + addend, sum = mean + small, taken = sum - mean;
  low = (mean - (sum - taken)) + (small - taken);
  mean = sum;
}

template <class T>
struct Stats {
  const T* x;
  Panel<Stat<T>> panel;
  double *mean, *low, *m2;  // of the lanes; what mean + low is exact to is beyond a double
};

// moments: s1 and s2 of rows [first, last) about `centre`, at 0 and at kTileLanes.
template <class T>
RESNET_FUSED_INLINE void sum_about(const Stats<T>& args, int64_t first, int64_t last, int64_t strip,
                                   int64_t width, const Stat<T>* centre, Stat<T>* moments) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  for (int64_t i = 0; i < width; i++) moments[i] = moments[kTileLanes + i] = S(0);
  const int64_t ahead = prefetch_distance<T>(panel.stride, kRowsAtOnce);
  for_each_row(first, last, [&](int64_t row, auto rows) RESNET_FUSED_INLINED {
    for_each_block(width, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
      const T* x = args.x + panel.at(row, strip + lane);
      const S* about = centre + lane;
      S* sums = moments + lane;
      const int count = n;
      constexpr int kRows = rows;
      for (int r = 0; r < kRows; r++) prefetch(x + r * panel.stride, ahead, n);
      RESNET_FUSED_VECTOR
      for (int i = 0; i < count; i++) {
        S s1 = 0, s2 = 0;
        RESNET_FUSED_UNROLL
        for (int r = 0; r < kRows; r++) {
          const S d = load(x[r * panel.stride + i]) - about[i];
          s1 += d;
          s2 += d * d;
        }
        sums[i] += s1;
        sums[kTileLanes + i] += s2;
      }
    });
  });
}

template <class T>
RESNET_FUSED_INLINE void stats(const Stats<T>& args) {
  using S = Stat<T>;
  const Panel<S>& panel = args.panel;
  alignas(64) S centre[kTileLanes], moments[2 * kTileLanes];
  for (int64_t first = 0; first < panel.rows; first += kTileRows) {
    const int64_t last = first + kTileRows < panel.rows ? first + kTileRows : panel.rows;
    const double count = double(last - first);
    for (int64_t strip = 0; strip < panel.lanes; strip += kTileLanes) {
      const int64_t width = panel.lanes - strip < kTileLanes ? panel.lanes - strip : kTileLanes;
      double *mean = args.mean + strip, *low = args.low + strip, *m2 = args.m2 + strip;
      if (first == 0) {
        const T* x = args.x + panel.at(0, strip);
        RESNET_FUSED_VECTOR
        for (int64_t i = 0; i < width; i++) centre[i] = load(x[i]);
        sum_about(args, first, last, strip, width, centre, moments);
        RESNET_FUSED_VECTOR
        for (int64_t i = 0; i < width; i++) {
          mean[i] = double(centre[i]) + double(moments[i]) * (1 / count);
          low[i] = 0;
          m2[i] = 0;
        }
      }
      RESNET_FUSED_VECTOR
      for (int64_t i = 0; i < width; i++) centre[i] = S(mean[i]);
      sum_about(args, first, last, strip, width, centre, moments);
      const double share = count / double(last), joint = double(first) * share, inverse = 1 / count;
      RESNET_FUSED_VECTOR
      for (int64_t i = 0; i < width; i++) {
        const double s1 = moments[i], s2 = moments[kTileLanes + i];
        const double shift = s1 * inverse, delta = (double(centre[i]) - mean[i]) - low[i] + shift;
        const double spread = s2 - s1 * shift;
        m2[i] += (spread < 0 ? 0 : spread) + delta * delta * joint;
        add_to_mean(mean[i], low[i], delta * share);
      }
    }
  }
}

RESNET_FUSED_CLONE_EACH(run_stats, Stats, stats(args))

// Merges the moments of `rows` values a lane into those of `count` values (Chan et al.).
RESNET_FUSED_CLONES void merge_lanes(double* mean, double* low, double* m2, double count,
                                     const double* other_mean, const double* other_low,
                                     const double* other_m2, double rows, int64_t lanes) {
  const double share = rows / (count + rows);
  RESNET_FUSED_VECTOR
  for (int64_t i = 0; i < lanes; i++) {
    const double delta = (other_mean[i] - mean[i]) + (other_low[i] - low[i]);
    add_to_mean(mean[i], low[i], delta * share);
    m2[i] += other_m2[i] + delta * delta * count * share;
  }
}

struct Moments {
  double count, mean, low, m2;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double delta = (other.mean - mean) + (other.low - low), share = other.count / (count + other.count);
    add_to_mean(mean, low, delta * share);
    m2 += other.m2 + delta * delta * count * share;
    count += other.count;
  }
};

// Of `slots` slots of `width` lanes.
struct MomentLanes {
  int64_t width;
  std::vector<double> mean, low, m2;

  MomentLanes(int64_t slots, int64_t width)
      : width(width), mean(slots * width), low(slots * width), m2(slots * width) {}
  // Merges slot after slot into the first one; rows(slot) is how many values a lane of it stands for.
  template <class Rows>
  void merge_into_first(int64_t slots, const Rows& rows) {
    double count = double(rows(0));
    for (int64_t slot = 1; slot < slots; slot++) {
      const int64_t at = slot * width;
      merge_lanes(&mean[0], &low[0], &m2[0], count, &mean[at], &low[at], &m2[at], double(rows(slot)), width);
      count += double(rows(slot));
    }
  }
  Moments at(int64_t slot, int64_t lane, int64_t rows) const {
    const int64_t i = slot * width + lane;
    return {double(rows), mean[i], low[i], m2[i]};
  }
};

// The moments of lanes of `rows` values each, all of one channel.
Moments pool(double* mean, const double* low, const double* m2, int64_t lanes, int64_t rows) {
  Moments all{double(lanes * rows), mean[0], 0, sum_of(m2, lanes)};
  for (int64_t i = 0; i < lanes; i++) mean[i] = (mean[i] - all.mean) + low[i];
  const double shift = sum_of(mean, lanes) / double(lanes);
  for (int64_t i = 0; i < lanes; i++) mean[i] = (mean[i] - shift) * (mean[i] - shift);
  all.m2 += double(rows) * sum_of(mean, lanes);
  add_to_mean(all.mean, all.low, shift);
  return all;
}

template <class T>
void batch_norm_stats(const BatchNormStats& op) {
  using S = Stat<T>;
  const Runs runs(op.shape, false);
  const ReduceTasks tasks(runs);
  // Channels last: the moments of the lanes of every task, then of what a folded row leaves over; contiguous:
  // those of every plane.
  const int64_t channels = runs.channels, width = runs.channels_last ? runs.lanes : 1;
  const int64_t rest = runs.empty() ? 0 : runs.length % runs.lanes;
  const int64_t slots = runs.channels_last ? tasks.count() : runs.count;
  MomentLanes lanes(slots + 1, width);
  if (!runs.empty()) {
    const int64_t full = runs.full_rows();
    const auto measure = [&](int64_t run, int64_t row, int64_t rows, int64_t count, double* mean, double* low,
                             double* m2) {
      const S* no_vectors = nullptr;
      if (rows * count > 0)
        run_stats(Stats<T>{static_cast<const T*>(op.x), runs.panel(run, row, rows, 0, count, no_vectors, 0),
                           mean, low, m2});
    };
    const auto measure_slot = [&](int64_t row, int64_t rows, int64_t count, int64_t slot) {
      const int64_t at = slot * width;
      measure(0, row, rows, count, &lanes.mean[at], &lanes.low[at], &lanes.m2[at]);
    };
    tasks.each([&](int64_t task) {
      const int64_t begin = tasks.begin(task), end = tasks.end(task);
      if (runs.channels_last) {
        measure_slot(begin, end - begin, width, task);
        if (task == slots - 1) measure_slot(full, 1, rest, slots);
        return;
      }
      double mean[kPlaneLanes], low[kPlaneLanes], m2[kPlaneLanes];
      for (int64_t plane = begin; plane < end; plane++) {
        Moments moments{};
        measure(plane, 0, full, runs.lanes, mean, low, m2);
        if (full > 0) moments = pool(mean, low, m2, runs.lanes, full);
        measure(plane, full, 1, rest, mean, low, m2);
        if (rest > 0) moments.merge(pool(mean, low, m2, rest, 1));
        lanes.mean[plane] = moments.mean;
        lanes.low[plane] = moments.low;
        lanes.m2[plane] = moments.m2;
      }
    });
  }
  if (runs.channels_last && !runs.empty())
    lanes.merge_into_first(slots, [&](int64_t task) { return tasks.end(task) - tasks.begin(task); });
  S *mean = static_cast<S*>(op.mean), *var = static_cast<S*>(op.var), *invstd = static_cast<S*>(op.invstd);
  for (int64_t c = 0; c < channels; c++) {
    Moments moments{};
    if (runs.channels_last) {
      for (int64_t lane = c; lane < width; lane += channels)
        moments.merge(lanes.at(0, lane, runs.full_rows()));
      for (int64_t lane = c; lane < rest; lane += channels) moments.merge(lanes.at(slots, lane, 1));
    } else {
      for (int64_t plane = c; plane < slots; plane += channels)
        moments.merge(lanes.at(plane, 0, runs.length));
    }
    const double variance = moments.count == 0 ? 0 : moments.m2 / moments.count;
    mean[c] = S(moments.mean + moments.low);
    var[c] = S(variance);
    invstd[c] = S(1 / std::sqrt(variance + op.eps));
  }
}

}  // namespace

void batch_norm_stats(const BatchNormStats& op) {
  dispatch(op.dtype, [&](auto element) { batch_norm_stats<decltype(element)>(op); });
}

}  // namespace resnet_fused::cpu
