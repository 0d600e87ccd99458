// Running mean and squared deviations of a panel, tile by tile (Chan's update: no sum of squares, nothing cancels).
#pragma once

#include "pack.h"

namespace {

// Moments of every lane over `count` rows so far; starts as zeros.
struct PanelMoments {
  int count;
  float mean[PANEL], m2[PANEL];
};

// Takes in the tile x[n][PANEL], whose sums over its rows are `total`.
template <int R>
void merge_tile(const float* x, int n, const vf (&total)[R], PanelMoments& p) {
  vf mean[R], m2[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    mean[r] = total[r] * (1.0f / n);
    m2[r] = vf{};
  }
  for (int i = 0; i < n; ++i) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      const vf deviation = load(x + i * PANEL + r * W) - mean[r];
      m2[r] = fma(deviation, deviation, m2[r]);
    }
  }
  const float share = (float)n / (float)(p.count + n);
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    const vf old = load(p.mean + r * W), delta = mean[r] - old;
    store(p.mean + r * W, fma(delta, set1(share), old));
    store(p.m2 + r * W, load(p.m2 + r * W) + fma(delta * delta, set1((float)p.count * share), m2[r]));
  }
  p.count += n;
}

}  // namespace
