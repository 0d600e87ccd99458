// Copies between the caller's strided tensors and the contiguous tiles that the kernels work on.
#pragma once

#include "gemm_tile.h"

namespace {

constexpr int PANEL = 3 * W;  // queries that a register tile covers at most; the row stride of lane-major tiles

// In place transpose of a W x W block held in W vectors.
template <class V>
GATE4D_INLINE void transpose(V (&x)[W]) {
#if defined(GATE4D_AVX512)
  __m512i t[16];
  GATE4D_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32((__m512i)x[2 * i], (__m512i)x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)x[2 * i], (__m512i)x[2 * i + 1]);
  }
  __m512i u[16];
  GATE4D_UNROLL for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  GATE4D_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    x[i] = (V)_mm512_shuffle_i32x4(a, c, 0x88);
    x[i + 8] = (V)_mm512_shuffle_i32x4(a, c, 0xdd);
    x[i + 4] = (V)_mm512_shuffle_i32x4(b, d, 0x88);
    x[i + 12] = (V)_mm512_shuffle_i32x4(b, d, 0xdd);
  }
#else
  V y[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) y[i][j] = x[j][i];
  for (int i = 0; i < W; ++i) x[i] = y[i];
#endif
}

// Rows of `dim` numbers to columns: to[d][lane] for `rows` lanes, zero in the other lanes of the panel and up
// to round_up(dim, W). `sign` is 1 or -1.
template <class T>
void pack_columns(const T* from, int64_t stride, int rows, int dim, float sign, float* to) {
  for (int lane = 0; lane < PANEL; lane += W) {
    for (int d = 0; d < dim; d += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) {
        x[i] = vf{};
        if (lane + i >= rows) continue;
        const T* row = from + (lane + i) * stride + d;
        if (d + W <= dim) {
          x[i] = load(row);
        } else {
          float part[W] = {};
          load_row(row, dim - d, part);
          x[i] = load(part);
        }
        x[i] *= sign;
      }
      transpose(x);
      for (int i = 0; i < W && d + i < dim; ++i) store(to + (d + i) * PANEL + lane, x[i]);
    }
  }
}

// Rows in the order stored, gathered where `index` is given: to[j][d], zero up to `padded` features and in
// the rows up to round_up(rows, J).
template <class T>
void pack_rows(const T* from, int64_t stride, const int32_t* index, int first, int rows, int dim, int padded,
               float* to) {
  for (int j = 0; j < rows; ++j) {
    float* row = to + (int64_t)j * padded;
    load_row(from + (int64_t)(index ? index[first + j] : first + j) * stride, dim, row);
    for (int d = dim; d < padded; ++d) row[d] = 0;
  }
  memset(to + (int64_t)rows * padded, 0, sizeof(float) * padded * (round_up(rows, J) - rows));
}

// Columns back to rows: to[lane][d] = from[d][lane] * factor[lane].
template <class T>
void unpack_columns(const float* from, const float* factor, int rows, int dim, T* to, int64_t stride) {
  for (int lane = 0; lane < rows; lane += W) {
    const vf f = load(factor + lane);
    for (int d = 0; d < dim; d += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = d + i < dim ? load(from + (d + i) * PANEL + lane) * f : vf{};
      transpose(x);
      for (int i = 0; i < W && lane + i < rows; ++i) {
        T* row = to + (lane + i) * stride + d;
        if (d + W <= dim) {
          store(row, x[i]);
        } else {
          float part[W];
          store(part, x[i]);
          store_row(part, dim - d, row);
        }
      }
    }
  }
}

#if defined(GATE4D_AVX512_BF16)
// The same three with pairs of bf16 along the dimension that the matrix product sums over.

GATE4D_INLINE vu load_pairs(const bf16* from, int count) {
  if (count >= 2 * W) return load((const uint32_t*)from);
  uint16_t part[2 * W] = {};
  memcpy(part, from, sizeof(uint16_t) * (count > 0 ? count : 0));
  vu x;
  memcpy(&x, part, sizeof x);
  return x;
}

// to[d / 2][lane] = features d and d + 1.
void pack_columns(const bf16* from, int64_t stride, int rows, int dim, float sign, uint32_t* to) {
  const uint32_t flip = sign < 0 ? 0x80008000u : 0u;
  for (int lane = 0; lane < PANEL; lane += W) {
    for (int d = 0; d < dim; d += 2 * W) {
      vu x[W];
      for (int i = 0; i < W; ++i)
        x[i] = (lane + i < rows ? load_pairs(from + (lane + i) * stride + d, dim - d) : vu{}) ^ flip;
      transpose(x);
      for (int i = 0; i < W && d + 2 * i < dim; ++i) store(to + (d / 2 + i) * PANEL + lane, x[i]);
    }
  }
}

// to[j][d / 2] = features d and d + 1; `padded` counts pairs.
void pack_rows(const bf16* from, int64_t stride, const int32_t* index, int first, int rows, int dim, int padded,
               uint32_t* to) {
  for (int j = 0; j < rows && dim > 0; ++j) {
    const bf16* row = from + (int64_t)(index ? index[first + j] : first + j) * stride;
    uint32_t* out = to + (int64_t)j * padded;
    out[padded - 1] = 0;
    memcpy(out, row, sizeof(bf16) * dim);
  }
  memset(to + (int64_t)rows * padded, 0, sizeof(uint32_t) * padded * (round_up(rows, J) - rows));
}

// to[j / 2][d] = rows j and j + 1.
void pack_row_pairs(const bf16* from, int64_t stride, const int32_t* index, int first, int rows, int dim, int padded,
                    uint32_t* to) {
  for (int j = 0; j < rows; j += 2) {
    const bf16* even = from + (int64_t)(index ? index[first + j] : first + j) * stride;
    const bf16* odd = j + 1 < rows ? from + (int64_t)(index ? index[first + j + 1] : first + j + 1) * stride : nullptr;
    uint32_t* out = to + (int64_t)(j / 2) * padded;
    int d = 0;
    for (; d + W <= dim; d += W) {
      const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + d)));
      const __m512i hi =
          odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + d))) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + d, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
    for (; d < dim; ++d) out[d] = even[d].bits | (odd ? (uint32_t)odd[d].bits << 16 : 0u);
    for (; d < padded; ++d) out[d] = 0;
  }
}

// Whether none of n pairs holds NaN or infinity.
inline bool all_finite(const uint32_t* x, int64_t n) {
  vi bad = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vu pair = load(x + i);
    bad |= ((pair & 0x7f80u) == 0x7f80u) | ((pair & 0x7f800000u) == 0x7f800000u);
  }
  bool found = any(bad);
  for (; i < n; ++i) found |= (x[i] & 0x7f80u) == 0x7f80u || (x[i] & 0x7f800000u) == 0x7f800000u;
  return !found;
}

// Two rows of probabilities to pairs.
GATE4D_INLINE vu to_pairs(vf even, vf odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // words 0..15 even, 16..31 odd
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, both);
}
#endif

// Hands out 64-byte aligned pieces of a task's scratch; with a null base it only counts.
struct Scratch {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = (T*)(base + used);
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

}  // namespace
