#include "large_buffers.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "accessible.h"

namespace resnet_fused::cpu {
namespace {

constexpr size_t kGranule = 64 << 10;
// Buffers of any size taken or given back until an idle one is unmapped: several training steps of the
// deepest network.
constexpr uint64_t kPatience = 4096;

char* map(size_t bytes) {
  void* buffer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return buffer == MAP_FAILED ? nullptr : static_cast<char*>(buffer);
}

struct Idle {
  size_t bytes;
  uint64_t since;  // the call that gave it back
};

struct Pool {
  // By address. Any whole granules can be taken, and unmapped, whatever was mapped or given back at once.
  using Pieces = std::map<char*, Idle>;

  std::mutex mutex;
  bool enabled = true;
  uint64_t calls = 0;
  size_t in_use = 0, idle_bytes = 0, most_in_use = 0;
  Pieces idle;
  std::unordered_map<void*, size_t> taken;

  Pieces::iterator oldest() {
    return std::min_element(idle.begin(), idle.end(),
                            [](const auto& a, const auto& b) { return a.second.since < b.second.since; });
  }

  // Unmaps the end of a piece.
  void unmap(Pieces::iterator piece, size_t bytes) {
    Idle& rest = piece->second;
    rest.bytes -= bytes;
    set_accessible(piece->first + rest.bytes, bytes, bytes);
    munmap(piece->first + rest.bytes, bytes);
    idle_bytes -= bytes;
    if (rest.bytes == 0) idle.erase(piece);
  }

  // Unmaps idle pieces, the oldest first, until those that are left and `needed` bytes are no more than
  // `bound`.
  void shrink(size_t needed, size_t bound) {
    while (!idle.empty() && idle_bytes + needed > bound) {
      const auto piece = oldest();
      unmap(piece, std::min(piece->second.bytes, idle_bytes + needed - bound));
    }
  }

  void unmap_stale() {
    while (!idle.empty()) {
      const auto piece = oldest();
      if (piece->second.since + kPatience >= calls) return;
      unmap(piece, piece->second.bytes);
    }
  }

  // Takes the smallest piece that is large enough, else the shortest run of pieces side by side.
  char* reuse(size_t bytes) {
    auto best = idle.end();
    for (auto piece = idle.begin(); piece != idle.end(); ++piece) {
      if (piece->second.bytes < bytes) continue;
      // Of equal ones the latest: most of it may still be in a cache.
      const auto key = [](const Idle& x) { return std::make_pair(x.bytes, ~x.since); };
      if (best == idle.end() || key(piece->second) < key(best->second)) best = piece;
    }
    if (best != idle.end()) return take(best, bytes);
    size_t shortest = 0;
    for (auto first = idle.begin(), piece = first; piece != idle.end(); ++piece) {
      if (piece != first && end_of(std::prev(piece)) != piece->first) first = piece;
      while (first != piece && size_t(end_of(piece) - std::next(first)->first) >= bytes) ++first;
      const size_t run = size_t(end_of(piece) - first->first);
      if (run < bytes || (best != idle.end() && run >= shortest)) continue;
      best = first;
      shortest = run;
    }
    return best == idle.end() ? nullptr : take(best, bytes);
  }

  static char* end_of(Pieces::iterator piece) { return piece->first + piece->second.bytes; }

  // Takes bytes from the beginning of a piece on, which those behind it must have.
  char* take(Pieces::iterator piece, size_t bytes) {
    char* const buffer = piece->first;
    idle_bytes -= bytes;
    for (size_t missing = bytes; missing > 0;) {
      const auto [start, found] = *piece;
      piece = idle.erase(piece);
      const size_t part = std::min(missing, found.bytes);
      missing -= part;
      if (part < found.bytes) idle.emplace(start + part, Idle{found.bytes - part, found.since});
    }
    return buffer;
  }

  // A step of training takes the same sizes again: all that it had in use at once may stay, and no more.
  char* map_anew(size_t bytes) {
    shrink(in_use + bytes, std::max(most_in_use, in_use + bytes));
    char* buffer = map(bytes);
    if (buffer == nullptr && !idle.empty()) {
      shrink(0, 0);
      buffer = map(bytes);
    }
    return buffer;
  }
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = [] {
    Pool* const pool_of_process = new Pool;
    // A child is a copy of the thread that forked: another one may not be left holding the mutex in it. Pages
    // that it shared with its parent would be copied when the parent writes to them.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] {
                     pool().shrink(0, 0);
                     pool().mutex.unlock();
                   });
    return pool_of_process;
  }();
  return *instance;
}

}  // namespace

void* take_large_buffer(size_t requested) {
  const size_t bytes = (requested + kGranule - 1) / kGranule * kGranule;
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (!all.enabled) return nullptr;
  all.calls++;
  char* buffer = all.reuse(bytes);
  all.unmap_stale();
  if (buffer == nullptr) buffer = all.map_anew(bytes);
  if (buffer == nullptr) return nullptr;
  set_accessible(buffer, requested, bytes);
  all.taken[buffer] = bytes;
  all.in_use += bytes;
  all.most_in_use = std::max(all.most_in_use, all.in_use);
  return buffer;
}

void give_large_buffer(void* buffer) {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto entry = all.taken.find(buffer);
  const size_t bytes = entry->second;
  all.taken.erase(entry);
  set_accessible(buffer, 0, bytes);
  all.in_use -= bytes;
  all.idle.emplace(static_cast<char*>(buffer), Idle{bytes, ++all.calls});
  all.idle_bytes += bytes;
}

int64_t release_large_buffers() {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const size_t bytes = all.idle_bytes;
  all.shrink(0, 0);
  all.most_in_use = all.in_use;
  return static_cast<int64_t>(bytes);
}

bool use_large_buffers(bool enabled) {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return std::exchange(all.enabled, enabled);
}

}  // namespace resnet_fused::cpu
