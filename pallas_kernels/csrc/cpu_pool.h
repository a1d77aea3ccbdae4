// Waiting for pieces of work that a running helper has taken.
#pragma once
#include <atomic>
#include <chrono>
#include <thread>

namespace twinfer {

// Returns when done >= count. Helpers end within microseconds unless the machine is busy and one was put aside in the
// middle of its piece; then sleeping gives it this thread's share of the processor, which yielding may not.
template <class T>
inline void wait_for(const std::atomic<T>& done, T count) {
  for (int turn = 0; done.load(std::memory_order_acquire) < count; ++turn) {
    if (turn < 2000) __builtin_ia32_pause();
    else if (turn < 2020) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace twinfer
