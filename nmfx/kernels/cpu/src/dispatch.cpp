// Which instruction set this machine runs, decided once.
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernel.h"

namespace nmfx {
namespace {

#if defined(__x86_64__)
// Linux gives a process the state of the tile registers only when asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
bool is_amd() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

// Families 17 and 18, and 19 with these models, see isa_avx2.cpp.
bool is_before_zen4() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned family = (a >> 8 & 15) + (a >> 20 & 255), model = (a >> 4 & 15) | (a >> 12 & 0xf0);
  return family < 0x19 || (family == 0x19 && (model < 0x10 || (model >= 0x20 && model < 0x60)));
}
#endif

bool has(const char* name) {
  if (!strcmp(name, "portable")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!strcmp(name, "avx2")) return avx2;
  if (!strcmp(name, "avx512")) return avx512;
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (!strcmp(name, "avx512_bf16")) return bf16;
  if (!strcmp(name, "amx_bf16"))
    return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           may_use_tiles();
#endif
  return false;
}

const Isa* const kBestFirst[] = {
#if defined(__x86_64__)
    &isa_amx_bf16, &isa_avx512_bf16, &isa_avx512, &isa_avx2,
#endif
    &isa_portable,
};

const Isa* tuned(const Isa* isa) {
#if defined(__x86_64__)
  if (!is_amd()) return isa;
  if (isa == &isa_avx2 && is_before_zen4()) return &isa_avx2_zen3;
  if (isa == &isa_avx512) return &isa_avx512_amd;
  if (isa == &isa_avx512_bf16) return &isa_avx512_bf16_amd;
#endif
  return isa;
}

const Isa* choose() {
  const char* pinned = getenv("NMFX_CPU_ISA");
  if (pinned && *pinned) return isa_by_name(pinned);  // the loader and the ops refuse a null
  for (const Isa* isa : kBestFirst)
    if (has(isa->name)) return tuned(isa);
  return &isa_portable;
}

}  // namespace

const Isa* isa_by_name(const char* name) {
  for (const Isa* isa : kBestFirst)
    if (!strcmp(isa->name, name) && has(name)) return tuned(isa);
  return nullptr;
}

static const Isa* in_use = choose();

const Isa* isa_in_use() { return __atomic_load_n(&in_use, __ATOMIC_RELAXED); }

bool use_isa(const char* name) {
  const Isa* isa = isa_by_name(name);
  if (isa) __atomic_store_n(&in_use, isa, __ATOMIC_RELAXED);
  return isa != nullptr;
}

}  // namespace nmfx
