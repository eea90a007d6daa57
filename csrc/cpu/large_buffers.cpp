#include "large_buffers.h"

#if defined(__linux__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

#include <mutex>
#include <unordered_map>
#include <vector>

namespace resnet_fused::cpu {
namespace {

constexpr size_t kGranule = 2 << 20;
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
  uint64_t requests = 0;
  std::vector<Idle> idle;  // in the order they were given back
  std::unordered_map<void*, size_t> taken;

  void unmap_before(uint64_t since) {
    size_t kept = 0;
    for (const Idle& each : idle) {
      if (each.since < since)
        unmap(each.buffer, each.bytes);
      else
        idle[kept++] = each;
    }
    idle.resize(kept);
  }
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

void* take_large_buffer(size_t bytes) {
  bytes = (bytes + kGranule - 1) / kGranule * kGranule;
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.requests++;
  void* buffer = nullptr;
  // The latest one: most of it may still be in a cache.
  for (size_t i = all.idle.size(); i-- > 0 && buffer == nullptr;) {
    if (all.idle[i].bytes != bytes) continue;
    buffer = all.idle[i].buffer;
    all.idle.erase(all.idle.begin() + static_cast<std::ptrdiff_t>(i));
  }
  if (all.requests > kPatience) all.unmap_before(all.requests - kPatience);
  if (buffer == nullptr) buffer = map(bytes);
  if (buffer != nullptr) all.taken[buffer] = bytes;
  return buffer;
}

void give_large_buffer(void* buffer) {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.taken.find(buffer);
  all.idle.push_back({buffer, found->second, all.requests});
  all.taken.erase(found);
}

int64_t release_large_buffers() {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  int64_t bytes = 0;
  for (const Idle& each : all.idle) bytes += static_cast<int64_t>(each.bytes);
  all.unmap_before(~uint64_t{0});
  return bytes;
}

}  // namespace resnet_fused::cpu
