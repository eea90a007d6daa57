// GEMM kernels: a block of C in registers, A broadcast element by element, B loaded as vectors.
//
// A is packed so that every address is the base plus a constant: [group of kRows rows][chunk of kLanes
// columns][row][column].

// Of B, [chunk][column of A][panel]; the distance between chunks is up to the caller.
constexpr int64_t kSlice = kLanes * kPanel;
// Chunks whose slices of B take a third of the first-level cache: a group of rows after another reads them.
constexpr int64_t kDepthChunks = (1 << 14) / (4 * kSlice);

// c[r][j] (+)= sum over chunks and d of a[r][d] * b[d][j] for r < R and j < kPanel.
template <int R>
RESNET_FUSED_INLINE void gemm_rows(const float* a, const float* b, int64_t b_stride, int64_t chunks,
                                   bool accumulate, float* c) {
  Vec sums[R][kVectors] = {};
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const float* row = b;
    for (int d = 0; d < kLanes; d++) {
      Vec columns[kVectors];
      RESNET_FUSED_UNROLL
      for (int v = 0; v < kVectors; v++) columns[v] = load(row + v * kLanes);
      RESNET_FUSED_UNROLL
      for (int r = 0; r < R; r++) {
        const float element = a[r * kLanes + d];
        RESNET_FUSED_UNROLL
        for (int v = 0; v < kVectors; v++) sums[r][v] += columns[v] * element;
      }
      row += kPanel;
    }
    b += b_stride;
    a += kRows * kLanes;
  }
  RESNET_FUSED_UNROLL
  for (int r = 0; r < R; r++) RESNET_FUSED_UNROLL
  for (int v = 0; v < kVectors; v++) {
    float* to = c + r * kPanel + v * kLanes;
    store(to, accumulate ? load(to) + sums[r][v] : sums[r][v]);
  }
}

template <int R>
void gemm_rows_of(int rows, const float* a, const float* b, int64_t b_stride, int64_t chunks, bool accumulate,
                  float* c) {
  if (rows == R) return gemm_rows<R>(a, b, b_stride, chunks, accumulate, c);
  if constexpr (R > 1) gemm_rows_of<R - 1>(rows, a, b, b_stride, chunks, accumulate, c);
}

// groups * rows x kPanel of C. The last group may have fewer rows.
inline void gemm(int64_t total_rows, int64_t rows, const float* a, int64_t group_size, const float* b,
                 int64_t b_stride, int64_t chunks, float* c) {
  for (int64_t first = 0; first < chunks; first += kDepthChunks) {
    const float *a_group = a + first * kRows * kLanes, *b_first = b + first * b_stride;
    for (int64_t row = 0; row < total_rows; row += rows, a_group += group_size)
      gemm_rows_of<kRows>(int(std::min(rows, total_rows - row)), a_group, b_first, b_stride,
                          std::min(kDepthChunks, chunks - first), first > 0, c + row * kPanel);
  }
}
