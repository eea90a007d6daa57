// Inside a cloned kernel: walks over a panel in blocks of lanes, packs and unpacks mask bits, sums over rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "element.h"
#include "panels.h"

namespace resnet_fused::cpu {

constexpr int kBlock = 64;
using FullBlock = std::integral_constant<int, kBlock>;

// body(row, lane, n) for every block of n lanes of a row; n is FullBlock, known to the compiler, for all but
// the last of a row, where it is an int.
template <class Body>
RESNET_FUSED_INLINE void for_each_block(int64_t lanes, const Body& body) {
  int64_t lane = 0;
  for (; lane + kBlock <= lanes; lane += kBlock) body(lane, FullBlock{});
  if (lane < lanes) body(lane, int(lanes - lane));
}

// Eight flags, each a byte of 0 or 1, to the bits of one byte: the multiplication moves bit 8*j to bit 56+j,
// and no two partial products meet.
RESNET_FUSED_INLINE uint8_t pack_flags(const uint8_t* flags) {
  uint64_t bytes;
  __builtin_memcpy(&bytes, flags, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  bytes = __builtin_bswap64(bytes);
#endif
  return uint8_t((bytes * 0x0102040810204080u) >> 56);
}

RESNET_FUSED_INLINE void unpack_flags(uint8_t bits, uint8_t* flags) {
  uint64_t bytes = (bits * 0x0101010101010101u) & 0x8040201008040201u;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  bytes = __builtin_bswap64(bytes);
#endif
  __builtin_memcpy(flags, &bytes, 8);
}

// flags: kBlock bytes, zero from n on.
template <class N>
RESNET_FUSED_INLINE void pack_mask(const uint8_t* flags, N n, uint8_t* mask) {
  if constexpr (std::is_same_v<N, FullBlock>) {
    for (int i = 0; i < kBlock; i += 8) mask[i / 8] = pack_flags(flags + i);
  } else {
    RESNET_FUSED_NO_UNROLL
    for (int i = 0; i < kBlock && i < n; i += 8) mask[i / 8] = pack_flags(flags + i);
  }
}

// flags: kBlock bytes, not zero where the bit is set; left as they are from the next multiple of eight on.
template <class N>
RESNET_FUSED_INLINE void unpack_mask(const uint8_t* mask, N n, uint8_t* flags) {
  if constexpr (std::is_same_v<N, FullBlock>) {
    for (int i = 0; i < kBlock; i += 8) unpack_flags(mask[i / 8], flags + i);
  } else {
    RESNET_FUSED_NO_UNROLL
    for (int i = 0; i < kBlock && i < n; i += 8) unpack_flags(mask[i / 8], flags + i);
  }
}

// Far enough ahead to hide the memory's latency, and short of what the first-level cache holds.
constexpr int64_t kPrefetchBytes = 4096;

// Fetches the n elements that are `ahead` of `address` into the cache. The machine's own prefetchers lose
// track where several rows are read side by side (a reduction reads at half the bandwidth without this), and
// a vector load under a mask does not even start before its mask is known.
template <class T, class N>
RESNET_FUSED_INLINE void prefetch(const T* address, int64_t ahead, N n) {
  constexpr int kPerLine = 64 / int(sizeof(T));
  // Not pointer arithmetic: the last of these addresses are past the end.
  const char* line = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(address) + ahead * sizeof(T));
  for (int i = 0; i < n; i += kPerLine, line += 64) RESNET_FUSED_PREFETCH(line);
}

// How far ahead to prefetch, in elements: in steps of `rows` rows where these are read side by side.
template <class T>
RESNET_FUSED_INLINE int64_t prefetch_distance(int64_t stride, int rows) {
  const int64_t step = rows * stride, distance = kPrefetchBytes / int64_t(sizeof(T));
  return (distance + step - 1) / step * step;
}

constexpr int kRowsAtOnce = 4;

// rows(first row, constant R) for the rows [first, last), kUnroll at a time and the rest one by one. What is
// kept by the lane is then loaded and stored once for kUnroll rows.
template <int kUnroll = kRowsAtOnce, class Rows>
RESNET_FUSED_INLINE void for_each_row(int64_t first, int64_t last, const Rows& rows) {
  int64_t row = first;
  for (; row + kUnroll <= last; row += kUnroll) rows(row, std::integral_constant<int, kUnroll>{});
  if constexpr (kUnroll > 1)
    for (; row < last; row++) rows(row, std::integral_constant<int, 1>{});
}

// Adds the column sums of a panel to sums[o * panel.stride + lane]. add_rows(tile, row, lane, n, constant R)
// adds n lanes of R rows to tile[o * kTileLanes + i].
template <int kSums, int kUnroll = kRowsAtOnce, class S, class Rows>
RESNET_FUSED_INLINE void sum_tiles(const Panel<S>& panel, double* sums, const Rows& add_rows) {
  alignas(64) S tile[kSums * kTileLanes];
  for (int64_t first = 0; first < panel.rows; first += kTileRows) {
    const int64_t last = first + kTileRows < panel.rows ? first + kTileRows : panel.rows;
    for (int64_t strip = 0; strip < panel.lanes; strip += kTileLanes) {
      const int64_t width = panel.lanes - strip < kTileLanes ? panel.lanes - strip : kTileLanes;
      for (int o = 0; o < kSums; o++)
        for (int64_t i = 0; i < width; i++) tile[o * kTileLanes + i] = S(0);
      for_each_row<kUnroll>(first, last, [&](int64_t row, auto rows) RESNET_FUSED_INLINED {
        for_each_block(width, [&](int64_t lane, auto n) RESNET_FUSED_INLINED {
          add_rows(tile + lane, row, strip + lane, n, rows);
        });
      });
      for (int o = 0; o < kSums; o++) {
        double* sum = sums + o * panel.stride + strip;
        const S* addend = tile + o * kTileLanes;
        RESNET_FUSED_VECTOR
        for (int64_t i = 0; i < width; i++) sum[i] += double(addend[i]);
      }
    }
  }
}

}  // namespace resnet_fused::cpu
