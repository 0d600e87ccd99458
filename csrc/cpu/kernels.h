// What the operators hand to the CPU kernels: raw pointers, sizes, strides. No torch, no instruction set.
#pragma once

#include <stdint.h>

namespace gate4d {

enum class DType { f32, bf16, f16 };

// A [B, H, N, D] tensor; strides in elements, the last one is 1.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

// The gate and the visible keys, the same for all heads; see semantics in gate4d/functional.py.
struct Gate {
  const float* query_score;  // a [B, Nq], null: 1 for every query
  const float* key_score;    // b [B, Nk], null: no weight. Given without query_score, key_weight is used
  const float* key_weight;   // (1 - b) ** strength [B, Nk], null unless query_score is null and key_score is not
  float strength;
  bool renormalize;
  bool folded;  // weights could leave the range of fp32: their logarithms join the logits, key_weight is one already
  const int32_t* bounds;      // [1 or B, 3, Nq] start, end, sink_end as positions among the kept keys, null: all
  int64_t bounds_batch;       // 0 or 3 * Nq
  const int32_t* kept;        // [B, Nk] indices of the kept keys in order, null: all are kept
  const int32_t* kept_count;  // [B]
};

struct AttentionForward {
  Heads q, k, v, out;
  float* lse;    // [B, H, Nq]
  float* stats;  // [3, B, H, Nq] entropy, largest probability, sum of squares, or null
  int batch, heads, queries, keys, head_dim, value_dim;
  DType dtype;
  float scale;
  Gate gate;
  int panels;  // panels of queries per task
};

struct AttentionBackward {
  Heads q, k, v, out, grad_out;
  const float *lse, *grad_lse;   // [B, H, Nq]; grad_lse may be null
  Heads grad_q, grad_k, grad_v;  // zeroed by the caller
  float* grad_q_parts;           // [chunks, B, H, Nq, D] in place of grad_q where there are several chunks
  float* grad_query_score;       // [chunks, B, H, Nq], or null
  float* grad_key_weight;        // [B, H, Nk] with respect to b, or to the key weight; zeroed; null if not asked for
  int batch, heads, queries, keys, head_dim, value_dim;
  DType dtype;
  float scale;
  Gate gate;
  int panels;
  int chunks;  // the keys of a head are split among this many tasks
};

struct ReceivedAttention {
  Heads q, k;
  const float* lse;  // [B, H, Nq]
  float *mean, *m2;  // [B, H, Nk] over all queries of a head
  int batch, heads, queries, keys, head_dim;
  DType dtype;
  float scale;
  Gate gate;   // without dropped keys: they concern no other key once lse is known
  int panels;  // panels of keys per task
};

// Some features of the rows of x: heads one after another, as layers of a model keep them.
struct Features {
  Heads x;  // [B, H, Nx, D]
  int heads, dim;
};

struct CrossMoments {
  const Features* x;        // one after another they make the F features
  const float *y, *centre;  // [B, Ny, F], whose last stride is 1, and [B, F]
  int64_t y_batch, y_row;
  float *mean, *m2;  // [B, Nx]
  int batch, rows, columns, features, parts;
  int panels;  // panels of x per task
};

// The kernels of one instruction set. A task is independent of every other; `scratch` is 64-byte aligned.
struct Kernels {
  const char* name;
  int panel;  // queries per panel
  int64_t (*forward_scratch)(const AttentionForward&);
  void (*forward)(const AttentionForward&, int64_t task, void* scratch);
  int64_t (*backward_scratch)(const AttentionBackward&);
  void (*backward)(const AttentionBackward&, int64_t task, void* scratch);
  void (*sum_parts)(const AttentionBackward&);  // grad_q_parts into grad_q
  int64_t (*received_scratch)(const ReceivedAttention&);
  void (*received)(const ReceivedAttention&, int64_t task, void* scratch);
  int64_t (*cross_scratch)(const CrossMoments&);
  void (*cross)(const CrossMoments&, int64_t task, void* scratch);
};

// The best instruction set of this processor, or the one GATE4D_CPU_ISA caps it to.
const Kernels& kernels();

}  // namespace gate4d
