// Mean and variance over j of x_i . y_j, a product that is never stored: rows of x along the lanes.
//
// A task is one block of panels of x, packed once with all features. For every tile of rows of y and chunk of
// features the tile is centred and packed, and multiplied with all panels; a full product goes into the moments.
// The product with the centre, the same for all j, is added to the mean at the end.
#pragma once

#include "gate_and_visibility.h"
#include "moments.h"

namespace {

using gate4d::CrossMoments;
using gate4d::Features;

constexpr int CHUNK = 256;  // features at a time: a part of a panel that stays near while all rows of a tile pass

// The pieces of a task's scratch.
struct CrossTile {
  float *x, *y, *s;  // [panels][features][PANEL], [TILE][CHUNK], [panels][TILE][PANEL]
  PanelMoments* moments;

  CrossTile(const CrossMoments& f, Scratch& scratch) {
    x = scratch.take<float>((int64_t)f.panels * f.features * PANEL);
    y = scratch.take<float>(TILE * CHUNK);
    s = scratch.take<float>((int64_t)f.panels * TILE * PANEL);
    moments = scratch.take<PanelMoments>(f.panels);
  }
};

// Rows of y about the centre: to[j][d], zero in the rows up to round_up(rows, J).
void pack_centred(const float* from, int64_t stride, const float* centre, int rows, int dim, float* to) {
  for (int j = 0; j < rows; ++j) {
    const float* row = from + j * stride;
    float* out = to + j * CHUNK;
    int d = 0;
    for (; d + W <= dim; d += W) store(out + d, load(row + d) - load(centre + d));
    for (; d < dim; ++d) out[d] = row[d] - centre[d];
  }
  memset(to + rows * CHUNK, 0, sizeof(float) * CHUNK * (round_up(rows, J) - rows));
}

// A panel of x: to[d][lane] for all features in order.
void pack_features(const CrossMoments& f, int batch, int first, int rows, float* to) {
  for (int i = 0; i < f.parts; ++i) {
    const Features& part = f.x[i];
    const float* x = (const float*)part.x.data + batch * part.x.batch + first * part.x.token;
    for (int h = 0; h < part.heads; ++h, to += (int64_t)part.dim * PANEL)
      pack_columns(x + h * part.x.head, part.x.token, rows, part.dim, 1.0f, to);
  }
}

// The products of a packed panel with one vector, added to out[lane].
void add_product(const float* x, const float* centre, int features, float* out) {
  for (int first = 0; first < features; first += CHUNK) {
    vf sum[3] = {};
    for (int d = first; d < min(first + CHUNK, features); ++d) {
      const float* const at = x + (int64_t)d * PANEL;
      GATE4D_UNROLL for (int r = 0; r < 3; ++r) sum[r] = fma(load(at + r * W), set1(centre[d]), sum[r]);
    }
    GATE4D_UNROLL for (int r = 0; r < 3; ++r) store(out + r * W, load(out + r * W) + sum[r]);
  }
}

template <int R>
void merge_product(const float* s, int n, PanelMoments& p) {
  vf total[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) total[r] = vf{};
  for (int i = 0; i < n; ++i) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) total[r] += load(s + i * PANEL + r * W);
  }
  merge_tile<R>(s, n, total, p);
}

void cross(const CrossMoments& f, int64_t task, void* memory) {
  Scratch scratch{(char*)memory};
  const CrossTile t(f, scratch);
  const int block = f.panels * PANEL, blocks = (f.rows + block - 1) / block;
  const int first_row = (int)(task % blocks) * block, batch = (int)(task / blocks);
  const int panels = min(f.panels, (f.rows - first_row + PANEL - 1) / PANEL);
  const float* y = f.y + batch * f.y_batch;
  const float* centre = f.centre + (int64_t)batch * f.features;
  const auto rows_of = [&](int panel) { return min(PANEL, f.rows - first_row - panel * PANEL); };

  memset(t.moments, 0, sizeof(PanelMoments) * panels);
  for (int i = 0; i < panels; ++i)
    pack_features(f, batch, first_row + i * PANEL, rows_of(i), t.x + (int64_t)i * f.features * PANEL);

  for (int first = 0; first < f.columns; first += TILE) {
    const int n = min(TILE, f.columns - first);
    for (int d = 0; d < f.features; d += CHUNK) {
      const int k = min(CHUNK, f.features - d);
      pack_centred(y + first * f.y_row + d, f.y_row, centre + d, n, k, t.y);
      for (int i = 0; i < panels; ++i) {
        const int vectors = (rows_of(i) + W - 1) / W;
        const auto product = vectors == 3   ? gemm_rows<Float, 3>
                             : vectors == 2 ? gemm_rows<Float, 2>
                                            : gemm_rows<Float, 1>;
        product(t.y, CHUNK, 1, t.x + ((int64_t)i * f.features + d) * PANEL, PANEL, t.s + i * TILE * PANEL, PANEL,
                round_up(n, J), k, d > 0);
      }
    }
    for (int i = 0; i < panels; ++i) merge_product<3>(t.s + i * TILE * PANEL, n, t.moments[i]);
  }

  for (int i = 0; i < panels; ++i) {
    const int64_t at = (int64_t)batch * f.rows + first_row + i * PANEL;
    add_product(t.x + (int64_t)i * f.features * PANEL, centre, f.features, t.moments[i].mean);
    memcpy(f.mean + at, t.moments[i].mean, sizeof(float) * rows_of(i));
    memcpy(f.m2 + at, t.moments[i].m2, sizeof(float) * rows_of(i));
  }
}

int64_t cross_scratch(const CrossMoments& f) {
  Scratch count{nullptr};
  CrossTile(f, count);
  return count.used;
}

}  // namespace
