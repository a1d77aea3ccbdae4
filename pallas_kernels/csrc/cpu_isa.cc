// Which builds of the kernel files this processor can run: asked once, AMX by asking the kernel for its state as well.
#include "cpu_isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "cpu_linear.h"

namespace twinfer {
namespace {

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

bool has_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

bool grants_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  return (d & wanted) == wanted && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa most_capable() {
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && has_bf16()) return grants_amx() ? Isa::kAmx : Isa::kBf16;
  if (v4) return Isa::kV4;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kV3 : Isa::kBase;
}

Isa capable() {
  static const Isa isa = most_capable();
  return isa;
}

std::atomic<int> forced{-1};

}  // namespace

Isa chosen_isa() {
  const int set = forced.load(std::memory_order_relaxed);
  if (set >= 0) return Isa(set);
  return capable() == Isa::kBf16 && !multiplies_bf16_well() ? Isa::kV4 : capable();
}

}  // namespace twinfer

extern "C" int twinfer_cpu_isa() { return int(twinfer::chosen_isa()); }

// For tests: products of many rows and prefills take this build from now on, -1 for the usual choice. False where the
// processor cannot run it.
extern "C" bool twinfer_cpu_force_isa(int isa) {
  if (isa > int(twinfer::capable())) return false;
  twinfer::forced.store(isa);
  return true;
}
