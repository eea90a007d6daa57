// For AddressSanitizer, which knows the blocks of the C library and not which part of one is in use.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace resnet_fused::cpu {

// Of the `capacity` bytes of a buffer the first `bytes` may be accessed: touching another is an error from
// now on.
inline void set_accessible(void* buffer, size_t bytes, size_t capacity) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(buffer, capacity);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(buffer) + bytes, capacity - bytes);
#else
  (void)buffer;
  (void)bytes;
  (void)capacity;
#endif
}

}  // namespace resnet_fused::cpu
