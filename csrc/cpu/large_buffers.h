// Memory for large results, used again and again.
//
// The C library maps every block of more than 32 MiB afresh and unmaps it when it is freed, so each training
// step pays for the same page faults again: 18 ms and more for 51 MB, of which writing it takes 3. Smaller
// blocks it takes from a heap, where results that live for a moment leave holes between those that are saved
// for backward: steps of ResNet-50 took up to 0.66 of eager's memory with those in the heap, and take up to
// 0.60.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resnet_fused::cpu {

// From here on results are large.
constexpr int64_t kLargeBuffer = 4 << 20;

// Idle and in use, buffers never take more than was in use at once: enough for a step of training to map
// none, while sizes that vary leave nothing behind.

// A buffer of at least that many bytes, aligned to a page; null where there is no memory, idle buffers
// included, and while buffers are switched off.
void* take_large_buffer(size_t bytes);
// Gives it back. Buffers that are not taken again for some time are unmapped, and all idle ones in a process
// that has been forked.
void give_large_buffer(void* buffer);
// Unmaps all buffers that are not in use, and forgets how much was; how many bytes they were.
int64_t release_large_buffers();
// Whether there are any; returns whether there were.
bool use_large_buffers(bool enabled);

}  // namespace resnet_fused::cpu
