// LayerNorm over the head dimension, RoPE-2D and the store into a key/value cache, in one pass over memory.
//
// A row is one token of one head. A warp holds a row: a lane has features i, i + D/4, i + D/2, i + 3D/4 for
// i = lane, lane + 32, so that both rotated pairs of a lane are its own and only the norm needs the warp. The
// arithmetic knows nothing of CUDA: the tests run the same functions on the CPU, lane after lane.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GATE4D_HD __host__ __device__ __forceinline__
#else
#define GATE4D_HD inline
#endif

namespace gate4d {

constexpr int WARP = 32;
constexpr int MAX_HEAD_DIM = 256;
constexpr int SLOTS = MAX_HEAD_DIM / 4 / WARP;  // quarters of features a lane holds at most

// How a type becomes a float and back. torch compiles CUDA sources with the implicit conversions of 16-bit types
// switched off, so norm_rope.cu names the conversion of each.
template <class T>
struct Number {
  static GATE4D_HD float read(T x) { return (float)x; }
  static GATE4D_HD T write(float x) { return (T)x; }
};

struct Rows {  // [B, H, N, D] in any memory
  void* data;
  int64_t batch, head, token, feature;  // strides
};

struct NormRope {
  Rows x, out;                                            // of the forward
  Rows grad_out, grad_x;                                  // of the backward
  const float* weight;                                    // [D] or null: 1
  const float* bias;                                      // [D] or null: 0
  const void* positions;                                  // [B, N, 2] (y, x) int32 or int64, null: no rotation
  const float* frequencies;                               // [D / 4], radians for one position
  float* grad_affine;                                     // [warps, 2, D] sums of each warp, null: not wanted
  int64_t position_batch, position_token, position_axis;  // strides
  int64_t batch, heads, tokens;
  int dim;
  bool long_positions, norm;
  float eps;
};

struct Row {
  int64_t b, h, n;
};

// Heads change fastest: models keep tokens as [B, N, H, D].
GATE4D_HD Row row_of(const NormRope& f, int64_t index) {
  const int64_t token = index / f.heads;
  return {token / f.tokens, index % f.heads, token % f.tokens};
}

GATE4D_HD int64_t offset(const Rows& x, const Row& r) { return r.b * x.batch + r.h * x.head + r.n * x.token; }

GATE4D_HD float position(const NormRope& f, const Row& r, int axis) {
  const int64_t at = r.b * f.position_batch + r.n * f.position_token + axis * f.position_axis;
  return f.long_positions ? (float)((const int64_t*)f.positions)[at] : (float)((const int32_t*)f.positions)[at];
}

// Sine and cosine of an angle, which must stay below 1e5: exact multiples of pi / 2 are taken off with a pi / 2 of
// three words. sinf would bring its slow path for any angle, with a stack.
GATE4D_HD void sine_cosine(float angle, float& sine, float& cosine) {
  const float quarters = rintf(angle * 0.636619772f);
  float rest = fmaf(-quarters, 1.5707962513e+00f, angle);
  rest = fmaf(-quarters, 7.5497894159e-08f, rest);
  rest = fmaf(-quarters, 5.3903029535e-15f, rest);
  float s, c;
#ifdef __CUDA_ARCH__
  sincospif(rest * 0.318309886f, &s, &c);
#else
  s = std::sin(rest), c = std::cos(rest);
#endif
  const int quadrant = (int)quarters & 3;
  sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
  if (quadrant & 2) sine = -sine;
  if (quadrant == 1 || quadrant == 2) cosine = -cosine;
}

// What one lane knows of a row: 4 features for each of its slots. Slots past the row hold 0 and are not stored.
struct Lane {
  int lane, quarter;
  float v[SLOTS][4];

  GATE4D_HD Lane(const NormRope& f, int lane) : lane(lane), quarter(f.dim / 4), v{} {}
  GATE4D_HD int slot(int s) const { return lane + s * WARP; }
  GATE4D_HD bool has(int s) const { return slot(s) < quarter; }
  GATE4D_HD int feature(int s, int part) const { return slot(s) + part * quarter; }

  template <class T>
  GATE4D_HD void load(const Rows& x, const Row& r) {
    const T* row = (const T*)x.data + offset(x, r);
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part)
        v[s][part] = has(s) ? Number<T>::read(row[feature(s, part) * x.feature]) : 0.0f;
  }

  template <class T>
  GATE4D_HD void store(const Rows& x, const Row& r) const {
    T* row = (T*)x.data + offset(x, r);
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part)
        if (has(s)) row[feature(s, part) * x.feature] = Number<T>::write(v[s][part]);
  }

  GATE4D_HD float sum() const {
    float total = 0.0f;
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part) total += v[s][part];
    return total;
  }

  GATE4D_HD float dot(const Lane& other) const {
    float total = 0.0f;
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part) total += v[s][part] * other.v[s][part];
    return total;
  }

  // v - mean; slots past the row stay 0.
  GATE4D_HD void center(float mean) {
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part)
        if (has(s)) v[s][part] -= mean;
  }

  GATE4D_HD void multiply(float factor) {
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part) v[s][part] *= factor;
  }

  GATE4D_HD void affine(const float* weight, const float* bias) {
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part) {
        if (!has(s)) continue;
        if (weight != nullptr) v[s][part] *= weight[feature(s, part)];
        if (bias != nullptr) v[s][part] += bias[feature(s, part)];
      }
  }

  // direction -1 undoes the rotation, which is what its gradient needs.
  GATE4D_HD void rotate(const NormRope& f, const Row& r, float direction) {
    for (int axis = 0; axis < 2; ++axis) {
      const float at = position(f, r, axis);
      for (int s = 0; s < SLOTS; ++s) {
        if (!has(s)) continue;
        float sin, c;
        sine_cosine(at * f.frequencies[slot(s)], sin, c);
        const float t = direction * sin;
        const float a = v[s][2 * axis], b = v[s][2 * axis + 1];
        v[s][2 * axis] = a * c - b * t;
        v[s][2 * axis + 1] = b * c + a * t;
      }
    }
  }

  // Gradient of the norm: rstd * (g - mean(g) - normed * mean(g * normed)).
  GATE4D_HD void norm_gradient(const Lane& normed, float mean, float projection, float rstd) {
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part)
        v[s][part] = has(s) ? rstd * (v[s][part] - mean - normed.v[s][part] * projection) : 0.0f;
  }

  // weight gets g * normed, bias gets g.
  GATE4D_HD void add_affine_gradient(const Lane& g, const Lane& normed, bool bias) {
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part) v[s][part] += bias ? g.v[s][part] : g.v[s][part] * normed.v[s][part];
  }

  GATE4D_HD void store_sums(float* to) const {
    for (int s = 0; s < SLOTS; ++s)
      for (int part = 0; part < 4; ++part)
        if (has(s)) to[feature(s, part)] = v[s][part];
  }
};

// A row through the forward or the backward. Warp is how lanes meet: on the GPU a lane is a thread and `all` a shuffle;
// on the CPU `each` runs over 32 lanes. `grad` of the backward ends as the gradient of x.
template <class T, class Warp>
GATE4D_HD void normalize(const NormRope& f, const Row& r, Warp& warp, typename Warp::Lanes& x, float& rstd) {
  warp.each([&](int i) { x[i].template load<T>(f.x, r); });
  rstd = 1.0f;
  if (!f.norm) return;
  const float mean = warp.sum([&](int i) { return x[i].sum(); }) / f.dim;
  warp.each([&](int i) { x[i].center(mean); });
  rstd = 1.0f / sqrtf(warp.sum([&](int i) { return x[i].dot(x[i]); }) / f.dim + f.eps);
  warp.each([&](int i) { x[i].multiply(rstd); });
}

template <class T, class Warp>
GATE4D_HD void forward_row(const NormRope& f, int64_t index, Warp& warp, typename Warp::Lanes& x) {
  const Row r = row_of(f, index);
  float rstd;
  normalize<T>(f, r, warp, x, rstd);
  warp.each([&](int i) {
    x[i].affine(f.weight, f.bias);
    if (f.positions != nullptr) x[i].rotate(f, r, 1.0f);
    x[i].template store<T>(f.out, r);
  });
}

template <class T, class Warp>
GATE4D_HD void backward_row(const NormRope& f, int64_t index, Warp& warp, typename Warp::Lanes& x,
                            typename Warp::Lanes& grad, typename Warp::Lanes& of_weight,
                            typename Warp::Lanes& of_bias) {
  const Row r = row_of(f, index);
  float rstd;
  normalize<T>(f, r, warp, x, rstd);
  warp.each([&](int i) {
    grad[i].template load<T>(f.grad_out, r);
    if (f.positions != nullptr) grad[i].rotate(f, r, -1.0f);
    if (f.grad_affine != nullptr) {
      of_weight[i].add_affine_gradient(grad[i], x[i], false);
      of_bias[i].add_affine_gradient(grad[i], x[i], true);
    }
    grad[i].affine(f.weight, nullptr);
  });
  if (f.norm) {
    const float mean = warp.sum([&](int i) { return grad[i].sum(); }) / f.dim;
    const float projection = warp.sum([&](int i) { return grad[i].dot(x[i]); }) / f.dim;
    warp.each([&](int i) { grad[i].norm_gradient(x[i], mean, projection, rstd); });
  }
  warp.each([&](int i) { grad[i].template store<T>(f.grad_x, r); });
}

}  // namespace gate4d
