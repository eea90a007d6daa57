#include "large_buffers.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "accessible.h"

namespace resnet_fused::cpu {
namespace {

constexpr size_t kGranule = 64 << 10;
// Requests of any size after which an idle buffer is unmapped: several training steps of the deepest network.
constexpr uint64_t kPatience = 2048;

#if defined(__linux__)
void* map(size_t bytes) {
  void* buffer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return buffer == MAP_FAILED ? nullptr : buffer;
}
void unmap(void* buffer, size_t bytes) { munmap(buffer, bytes); }
#else
void* map(size_t bytes) { return std::aligned_alloc(4096, bytes); }
void unmap(void* buffer, size_t) { std::free(buffer); }
#endif

struct Idle {
  void* buffer;
  size_t bytes;
  uint64_t since;
};

struct Pool {
  std::mutex mutex;
  bool enabled = true;
  uint64_t requests = 0;
  size_t in_use = 0, idle_bytes = 0, most_in_use = 0;
  std::vector<Idle> idle;  // in the order they were given back
  std::unordered_map<void*, size_t> taken;

  // Unmaps idle buffers, the oldest first, until those that are left and `needed` bytes are no more than
  // `bound`.
  void shrink(size_t needed, size_t bound) {
    size_t gone = 0;
    while (gone < idle.size() && idle_bytes + needed > bound) {
      set_accessible(idle[gone].buffer, idle[gone].bytes, idle[gone].bytes);
      unmap(idle[gone].buffer, idle[gone].bytes);
      idle_bytes -= idle[gone++].bytes;
    }
    idle.erase(idle.begin(), idle.begin() + static_cast<std::ptrdiff_t>(gone));
  }

  void unmap_stale() {
    while (!idle.empty() && idle.front().since + kPatience < requests) shrink(0, idle_bytes - 1);
  }

  void* reuse(size_t bytes) {
    // The latest one: most of it may still be in a cache.
    for (size_t i = idle.size(); i-- > 0;) {
      if (idle[i].bytes != bytes) continue;
      void* buffer = idle[i].buffer;
      idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(i));
      idle_bytes -= bytes;
      return buffer;
    }
    return nullptr;
  }

  // A step of training takes the same sizes again: all that it had in use at once may stay, and no more.
  void* map_anew(size_t bytes) {
    shrink(in_use + bytes, std::max(most_in_use, in_use + bytes));
    void* buffer = map(bytes);
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
#if defined(__linux__)
    // A child is a copy of the thread that forked: another one may not be left holding the mutex in it. Pages
    // that it shared with its parent would be copied when the parent writes to them.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] {
                     pool().shrink(0, 0);
                     pool().mutex.unlock();
                   });
#endif
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
  all.requests++;
  void* buffer = all.reuse(bytes);
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
  all.idle.push_back({buffer, bytes, all.requests});
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
