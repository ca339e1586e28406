// Which elements of each group are kept: all bits set where kept, else none.
//
// The N-th largest of a group is found for one group per lane, by a sorting network without
// branches; an element is kept that is no smaller. Where more than N are no smaller, there are ties
// at the threshold, and the group is done once more, in order.
//
//   columns (inner > 1)   memory has the k-th elements of neighbouring groups side by side
//   rows (inner == 1)     a group is contiguous: M vectors are transposed in registers, and the
//                         thresholds are spread over their groups again
//
// Included by one file per instruction set, which defines kBytes, the size of a vector, and
// any(vector): whether any bit of it is set.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "masks.h"

namespace nmfx {
namespace {

#define NMFX_INLINE inline __attribute__((always_inline))

template <class K>
struct Lanes {
  typedef K Vector __attribute__((vector_size(kBytes)));
  static constexpr int kCount = kBytes / int(sizeof(K));
};
template <class K>
using Vec = typename Lanes<K>::Vector;
template <class K>
constexpr int kLanes = Lanes<K>::kCount;

template <class K>
NMFX_INLINE Vec<K> load(const K* p) {
  Vec<K> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class K>
NMFX_INLINE void store(K* p, Vec<K> v) {
  memcpy(p, &v, sizeof v);
}
template <class K>
NMFX_INLINE Vec<K> larger(Vec<K> a, Vec<K> b) {
  return a > b ? a : b;
}
template <class K>
NMFX_INLINE Vec<K> smaller(Vec<K> a, Vec<K> b) {
  return a < b ? a : b;
}

// Sorts like |w|, every NaN equal: `limit` is the bits of +Inf, plus one.
template <class K>
NMFX_INLINE Vec<K> magnitude(const K* p, K limit) {
  constexpr K kUnsigned = K(typename std::make_unsigned<K>::type(-1) >> 1);
  return smaller<K>(load(p) & kUnsigned, Vec<K>{} + limit);
}
template <class K>
NMFX_INLINE K magnitude_of(K bits, K limit) {
  K key = bits & K(typename std::make_unsigned<K>::type(-1) >> 1);
  return key < limit ? key : limit;
}

// --- the N-th largest ----------------------------------------------------------------------------

// Batcher's odd-even mergesort of P vectors from k[LO] on, descending.
template <class K, int LO, int P, int R>
NMFX_INLINE void merge(Vec<K>* k) {
  auto exchange = [k](int i, int j) __attribute__((always_inline)) {
    Vec<K> high = larger<K>(k[i], k[j]), low = smaller<K>(k[i], k[j]);
    k[i] = high, k[j] = low;
  };
  if constexpr (2 * R < P) {
    merge<K, LO, P, 2 * R>(k);
    merge<K, LO + R, P, 2 * R>(k);
    _Pragma("GCC unroll 64") for (int i = LO + R; i + R < LO + P; i += 2 * R) exchange(i, i + R);
  } else {
    exchange(LO, LO + R);
  }
}
template <class K, int LO, int P>
NMFX_INLINE void sort(Vec<K>* k) {
  if constexpr (P > 1) {
    sort<K, LO, P / 2>(k);
    sort<K, LO + P / 2, P / 2>(k);
    merge<K, LO, P, 1>(k);
  }
}

// The n-th largest of k[0..P), for each lane. Two sorted halves need no merging: it is the largest,
// over all ways to take i from one and n - i from the other, of the smallest that is taken.
template <class K, int P>
NMFX_INLINE Vec<K> nth_largest(Vec<K>* k, int n) {
  if (n == 1) {
    Vec<K> top = k[0];
    _Pragma("GCC unroll 64") for (int i = 1; i < P; i++) top = larger<K>(top, k[i]);
    return top;
  }
  constexpr int H = P / 2;
  sort<K, 0, H>(k);
  sort<K, H, H>(k);
  if constexpr (P == 2) return smaller<K>(k[0], k[1]);
  if constexpr (P == 4) {
    if (n == 2) return larger<K>(larger<K>(k[1], k[3]), smaller<K>(k[0], k[2]));
    if (n == 3) return larger<K>(smaller<K>(k[1], k[2]), smaller<K>(k[0], k[3]));
    return smaller<K>(k[1], k[3]);
  }
  Vec<K> sorted[P];  // indexed by n, and so in memory
  _Pragma("GCC unroll 64") for (int i = 0; i < P; i++) sorted[i] = k[i];
  int i = n > H ? n - H : 0;
  const int last = n < H ? n : H;
  Vec<K> best = i ? smaller<K>(sorted[i - 1], sorted[P - 1]) : sorted[H + n - 1];
  if (last == n) {
    best = larger<K>(best, sorted[n - 1]);
    for (i++; i < last; i++)
      best = larger<K>(best, smaller<K>(sorted[i - 1], sorted[H + n - i - 1]));
  } else {
    for (i++; i <= last; i++)
      best = larger<K>(best, smaller<K>(sorted[i - 1], sorted[H + n - i - 1]));
  }
  return best;
}

// The N-th largest of two sorted halves k[0..H), k[H..2H), for each lane; 0 < N <= 2H.
template <class K, int H, int N, int I = (N > H ? N - H : 0)>
NMFX_INLINE Vec<K> of_halves(const Vec<K>* k) {
  constexpr bool kLast = I == (N < H ? N : H);
  Vec<K> here;
  if constexpr (I == 0)
    here = k[H + N - 1];
  else if constexpr (I == N)
    here = k[N - 1];
  else
    here = smaller<K>(k[I - 1], k[H + N - I - 1]);
  if constexpr (kLast)
    return here;
  else
    return larger<K>(here, of_halves<K, H, N, I + 1>(k));
}

// The N-th largest of k[0..P), and the one after it.
template <class K, int P, int N>
NMFX_INLINE void nth_and_next(Vec<K>* k, Vec<K>& nth, Vec<K>& next) {
  constexpr int H = P / 2;
  sort<K, 0, H>(k);
  sort<K, H, H>(k);
  nth = of_halves<K, H, N>(k);
  if constexpr (N < P) next = of_halves<K, H, N + 1>(k);
}

// --- columns -------------------------------------------------------------------------------------

// The groups in lanes [0, kLanes) of m <= P rows, m == P if EXACT: row k starts at w + k * step, its
// mask goes to mask + k * mask_step, whole vectors, rows in ascending order.
template <class K, int P, bool EXACT>
NMFX_INLINE void column_masks(const K* w, int64_t step, K* mask, int64_t mask_step, int m, int n,
                              K limit) {
  Vec<K> k[P], keys[EXACT ? P : 1];
  _Pragma("GCC unroll 64") for (int i = 0; i < P; i++) {
    if (EXACT || i < m)
      k[i] = magnitude(w + i * step, limit);
    else
      k[i] = Vec<K>{} - K(1);  // smaller than any
    if constexpr (EXACT) keys[i] = k[i];
  }
  const Vec<K> least = nth_largest<K, P>(k, n);
  Vec<K> kept = {};
  if constexpr (EXACT) {
    _Pragma("GCC unroll 8") for (int i = 0; i < P; i++) {
      const Vec<K> keep = keys[i] >= least;
      kept -= keep;
      store(mask + i * mask_step, keep);
    }
  } else {
    for (int i = 0; i < m; i++) {
      const Vec<K> keep = magnitude(w + i * step, limit) >= least;
      kept -= keep;
      store(mask + i * mask_step, keep);
    }
  }
  if (!any(kept - K(n))) return;
  Vec<K> room = Vec<K>{} + K(n);
  for (int i = 0; i < m; i++) room += magnitude(w + i * step, limit) > least;
  for (int i = 0; i < m; i++) {
    const Vec<K> key = magnitude(w + i * step, limit);
    const Vec<K> tied = (key == least) & (room > 0);
    room += tied;
    store(mask + i * mask_step, (key > least) | tied);
  }
}

// Columns [0, width) of `slabs` of m rows, each `slab` elements after the one before, in `w` as in
// `mask`. Reads nothing at or after `end`; writes up to a vector past each row.
template <class K, int P, bool EXACT>
void columns(const K* w, int64_t step, const K* end, K* mask, int64_t mask_step, int64_t width,
             int64_t slabs, int64_t slab, int m, int n, K limit) {
  constexpr int L = kLanes<K>;
  for (; slabs > 0; slabs--, w += slab, mask += slab) {
    for (int64_t c = 0; c < width; c += L) {
      // The last vector of a wide row may begin early; that of a narrow one reads what follows.
      if (width >= L && width - c < L) c = width - L;
      if (end - (w + c) >= (m - 1) * step + L) {
        column_masks<K, P, EXACT>(w + c, step, mask + c, mask_step, m, n, limit);
        continue;
      }
      K rows[P * L] = {};
      for (int i = 0; i < m; i++)
        memcpy(rows + i * L, w + i * step + c, size_t(width - c < L ? width - c : L) * sizeof(K));
      column_masks<K, P, EXACT>(rows, L, mask + c, mask_step, m, n, limit);
    }
  }
}

// --- rows ----------------------------------------------------------------------------------------

template <class K, class U, int S, bool HIGH, size_t... I>
NMFX_INLINE Vec<K> swap_lanes(Vec<K> a, Vec<K> b, std::index_sequence<I...>) {
  // Blocks of S lanes: [a0 b0 ..] if not HIGH, else [a1 b1 ..]
  constexpr int L = kLanes<U>;
  Vec<U> x, y;
  memcpy(&x, &a, sizeof x), memcpy(&y, &b, sizeof y);
  x = __builtin_shufflevector(
      x, y, (int(I) & S ? L + int(I) - (HIGH ? 0 : S) : int(I) + (HIGH ? S : 0))...);
  Vec<K> result;
  memcpy(&result, &x, sizeof x);
  return result;
}

// Swaps blocks of S lanes between a and b: a step of a transposition.
template <class K, int S>
NMFX_INLINE void swap_blocks(Vec<K>& a, Vec<K>& b) {
  if constexpr (sizeof(K) == 2 && S == 1) {
    // Shifts: CPUs shuffle single 16-bit lanes slowly.
    Vec<uint32_t> x, y;
    memcpy(&x, &a, sizeof x), memcpy(&y, &b, sizeof y);
    const Vec<uint32_t> low = (x & 0xffffu) | (y << 16), high = (x >> 16) | (y & 0xffff0000u);
    memcpy(&a, &low, sizeof a), memcpy(&b, &high, sizeof b);
  } else {
    using U = typename std::conditional<sizeof(K) == 2, int32_t, K>::type;
    constexpr int T = sizeof(K) == 2 ? S / 2 : S;
    std::make_index_sequence<size_t(kLanes<U>)> lanes;
    const Vec<K> low = swap_lanes<K, U, T, false>(a, b, lanes);
    b = swap_lanes<K, U, T, true>(a, b, lanes);
    a = low;
  }
}

// Transposes the S x S blocks of lanes of k[0], k[STEP], .., k[(S - 1) * STEP].
template <class K, int S, int STEP, int T = 1>
NMFX_INLINE void transpose(Vec<K>* k) {
  if constexpr (T < S) {
    _Pragma("GCC unroll 64") for (int i = 0; i < S; i++) if (!(i & T))
        swap_blocks<K, T>(k[i * STEP], k[(i + T) * STEP]);
    transpose<K, S, STEP, 2 * T>(k);
  }
}

// Lane i of each block of S lanes, spread over its block.
template <class K, int S, int LANE, size_t... I>
NMFX_INLINE Vec<K> spread(Vec<K> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (int(I) / S * S + LANE)...);
}

// kLanes groups of M contiguous elements, in M vectors.
template <class K, int M>
struct Rows {
  static constexpr int L = kLanes<K>;
  static constexpr int S = M < L ? M : L;  // elements of a group in one vector
  static constexpr int C = M / S;          // vectors of a group
  static constexpr bool kInRegisters = M <= 8;

  // Before transposing, vector v holds part v % C of S-element pieces; group (v / C, lane / S).
  template <size_t... V>
  static NMFX_INLINE void keep(const K* w, K* mask, Vec<K> least, K limit, const Vec<K>* keys,
                               std::index_sequence<V...>) {
    std::make_index_sequence<size_t(L)> lanes;
    (store(mask + V * L, (kInRegisters ? keys[kInRegisters ? V : 0] : magnitude(w + V * L, limit)) >=
                             spread<K, S, int(V) / C>(least, lanes)),
     ...);
  }

  template <int N>
  static NMFX_INLINE void masks(const K* w, K* mask, int n, K limit) {
    Vec<K> k[M], keys[kInRegisters ? M : 1];
    // Key c * S + e of a group: after the transposition in vector c + e * C.
    _Pragma("GCC unroll 64") for (int i = 0; i < M; i++) k[i] = magnitude(w + i * L, limit);
    if constexpr (kInRegisters)
      _Pragma("GCC unroll 8") for (int i = 0; i < M; i++) keys[i] = k[i];
    _Pragma("GCC unroll 64") for (int c = 0; c < C; c++) transpose<K, S, C>(k + c);
    Vec<K> least, tied = {};
    if constexpr (N != 0) {
      Vec<K> next = {};
      nth_and_next<K, M, N>(k, least, next);
      if constexpr (N < M) tied = next == least;
    } else {
      Vec<K> sorted[M];
      _Pragma("GCC unroll 64") for (int i = 0; i < M; i++) sorted[i] = k[i];
      least = nth_largest<K, M>(sorted, n);
      _Pragma("GCC unroll 64") for (int i = 0; i < M; i++) tied -= k[i] >= least;
      tied -= K(n);
    }
    keep(w, mask, least, limit, keys, std::make_index_sequence<size_t(M)>());
    if (any(tied)) break_ties(w, mask, tied, least, n, limit);
  }

  static __attribute__((noinline)) void break_ties(const K* w, K* mask, Vec<K> surplus,
                                                   Vec<K> least, int n, K limit) {
    for (int lane = 0; lane < L; lane++) {
      if (!surplus[lane]) continue;
      const int group = M < L ? lane % S * (L / S) + lane / S : lane;
      const K* g = w + group * M;
      K room = K(n);
      for (int i = 0; i < M; i++) room -= magnitude_of(g[i], limit) > least[lane];
      for (int i = 0; i < M; i++) {
        if (magnitude_of(g[i], limit) != least[lane]) continue;
        mask[group * M + i] = room > 0 ? K(-1) : K(0);
        room -= room > 0;
      }
    }
  }
};

// Groups [0, groups) of M contiguous elements, a power of two. N is n, or 0 for any.
template <class K, int M, int N>
void rows_of(const K* w, K* mask, int64_t groups, int n, K limit) {
  constexpr int L = kLanes<K>;
  int64_t g = 0;
  for (; g + L <= groups; g += L)
    Rows<K, M>::template masks<N>(w + g * M, mask + g * M, n, limit);
  if (g == groups) return;
  K last[M * L] = {}, masks[M * L];
  memcpy(last, w + g * M, size_t(groups - g) * M * sizeof(K));
  Rows<K, M>::template masks<N>(last, masks, n, limit);
  memcpy(mask + g * M, masks, size_t(groups - g) * M * sizeof(K));
}

template <class K, int M>
void rows(const K* w, K* mask, int64_t groups, int n, K limit) {
  if constexpr (M >= 4 && M <= 16) {
    if (n == 1) return rows_of<K, M, 1>(w, mask, groups, n, limit);
    if (n == 2) return rows_of<K, M, 2>(w, mask, groups, n, limit);
    if (2 * n == M) return rows_of<K, M, M / 2>(w, mask, groups, n, limit);
  }
  rows_of<K, M, 0>(w, mask, groups, n, limit);
}

// The same for any m <= P, element by element into columns and back.
template <class K, int P>
void odd_rows(const K* w, K* mask, int64_t groups, int m, int n, K limit) {
  constexpr int L = kLanes<K>;
  K keys[P * L] = {}, masks[P * L];
  for (int64_t g = 0; g < groups; g += L) {
    const int lanes = groups - g < L ? int(groups - g) : L;
    for (int lane = 0; lane < lanes; lane++)
      for (int i = 0; i < m; i++) keys[i * L + lane] = w[(g + lane) * m + i];
    column_masks<K, P, false>(keys, L, masks, L, m, n, limit);
    for (int lane = 0; lane < lanes; lane++)
      for (int i = 0; i < m; i++) mask[(g + lane) * m + i] = masks[i * L + lane];
  }
}

// --- what is called ------------------------------------------------------------------------------

template <class K>
void mask_rows(const K* w, K* mask, int64_t groups, int m, int n, K limit) {
  switch (m) {
    case 2: return rows<K, 2>(w, mask, groups, n, limit);
    case 4: return rows<K, 4>(w, mask, groups, n, limit);
    case 8: return rows<K, 8>(w, mask, groups, n, limit);
    case 16: return rows<K, 16>(w, mask, groups, n, limit);
    case 32: return rows<K, 32>(w, mask, groups, n, limit);
    case 64: return rows<K, 64>(w, mask, groups, n, limit);
  }
  if (m < 8) return odd_rows<K, 8>(w, mask, groups, m, n, limit);
  if (m < 16) return odd_rows<K, 16>(w, mask, groups, m, n, limit);
  return odd_rows<K, 64>(w, mask, groups, m, n, limit);
}

template <class K>
void mask_columns(const K* w, int64_t step, const K* end, K* mask, int64_t mask_step,
                  int64_t width, int64_t slabs, int64_t slab, int m, int n, K limit) {
  const auto columns_of = m == 2    ? columns<K, 2, true>
                          : m == 4  ? columns<K, 4, true>
                          : m == 8  ? columns<K, 8, true>
                          : m <= 4  ? columns<K, 4, false>
                          : m <= 8  ? columns<K, 8, false>
                          : m <= 16 ? columns<K, 16, false>
                          : m <= 32 ? columns<K, 32, false>
                                    : columns<K, 64, false>;
  columns_of(w, step, end, mask, mask_step, width, slabs, slab, m, n, limit);
}

}  // namespace
}  // namespace nmfx
