// Memory for large results, used again and again.
//
// The C library maps every block of more than 32 MiB afresh and unmaps it when it is freed, so each training
// step pays for the same page faults again: 18 ms and more for 51 MB, of which writing it takes 3.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resnet_fused::cpu {

// What the C library maps itself: glibc's largest mmap threshold on 64-bit machines.
constexpr int64_t kLargeBuffer = 32 << 20;

// Idle and in use, buffers never take more than was in use at once: enough for a step of training to map
// none, while sizes that vary leave nothing behind.

// A buffer of at least that many bytes, aligned to a page; null where there is no memory, idle buffers
// included.
void* take_large_buffer(size_t bytes);
// Gives it back. Buffers that are not taken again for some time are unmapped.
void give_large_buffer(void* buffer);
// Unmaps all buffers that are not in use, and forgets how much was; how many bytes they were.
int64_t release_large_buffers();

}  // namespace resnet_fused::cpu
