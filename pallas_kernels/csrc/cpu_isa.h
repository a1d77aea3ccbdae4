// Which builds of the kernel files this processor can run.
#pragma once

namespace twinfer {

// Each processor that can run one can run those before it.
enum class Isa : int { kBase = 0, kV3 = 1, kV4 = 2, kBf16 = 3, kAmx = 4 };

// The fastest that the processor and the kernel grant, or what a test has set instead. AVX512_BF16 counts on AMD alone:
// on Intel it multiplied pairs at 0.8 times the speed of widened floats.
Isa chosen_isa();

}  // namespace twinfer
