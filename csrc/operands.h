// The operands that the operators over the score matrix share: checked, with their sizes, as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "checks.h"
#include "cpu/gate_input.h"

namespace gate4d {

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::bf16;
    case torch::headeronly::ScalarType::Half:
      return DType::f16;
    default:
      fail(name, " must be float32, bfloat16 or float16, got ", dtype_name(dtype_code(x)), '.');
  }
}

// Sizes of queries and keys that fit together.
struct Sizes {
  int64_t batch, heads, queries, keys, dim;
  int32_t code;
  DType dtype;

  Sizes(const Tensor& q, const Tensor& k) : code(dtype_code(q)), dtype(dtype_of(q, "q")) {
    const int64_t* const n = expect(q, "q", code, {ANY, ANY, ANY, ANY});
    batch = n[0], heads = n[1], queries = n[2], dim = n[3];
    keys = expect(k, "k", code, {batch, heads, ANY, dim})[2];
    for (int64_t size : {batch, heads, queries, keys}) expect_size("each of B, H, Nq and Nk", size, MAX_SIZE);
    expect_size("the head dimension", dim, MAX_DIM);
  }

  int64_t expect_values(const Tensor& v) const {
    const int64_t value_dim = expect(v, "v", code, {batch, heads, keys, ANY})[3];
    expect_size("the head dimension of v", value_dim, MAX_DIM);
    return value_dim;
  }
};

template <class T>
const T* data_or_null(const Optional& x) {
  return x ? (const T*)x->data_ptr() : nullptr;
}

inline Optional dense(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : x; }

// Checked. Keeps contiguous copies alive as long as the kernels' view of them.
struct GateTensors {
  Optional query_score, key_score, dropped, bounds;
  int64_t bounds_batch = 1;

  GateTensors(const Sizes& n, const Optional& a, const Optional& b, const Optional& drop, const Optional& visible,
              double strength)
      : query_score(scores(a, "query_score", n.batch, n.queries)), key_score(scores(b, "key_score", n.batch, n.keys)) {
    expect_strength(strength);
    if (drop) {
      expect(*drop, "dropped_keys", aoti_torch_dtype_bool(), {n.batch, n.keys});
      dropped = dense(drop);
    }
    if (!visible) return;
    bounds_batch = expect(*visible, "bounds", aoti_torch_dtype_int32(), {ANY, 3, n.queries})[0];
    if (bounds_batch != 1 && bounds_batch != n.batch)
      fail("bounds must have a batch of 1 or ", n.batch, ", got ", bounds_batch, '.');
    bounds = dense(visible);
    expect_bounds(data_or_null<int32_t>(bounds), bounds_batch, n.queries, n.keys);
  }

  GateInput input(const Sizes& n, double strength, bool renormalize, bool squares) const {
    return {(int)n.batch,
            (int)n.queries,
            (int)n.keys,
            data_or_null<float>(query_score),
            data_or_null<float>(key_score),
            data_or_null<uint8_t>(dropped),
            data_or_null<int32_t>(bounds),
            (int)bounds_batch,
            (float)strength,
            renormalize,
            squares ? SMALLEST_SQUARED_WEIGHT : SMALLEST_WEIGHT};
  }

 private:
  static Optional scores(const Optional& x, const char* name, int64_t batch, int64_t tokens) {
    if (!x) return x;
    expect(*x, name, aoti_torch_dtype_float32(), {batch, tokens});
    const Optional score = dense(x);
    expect_scores(name, data_or_null<float>(score), batch * tokens);
    return score;
  }
};

}  // namespace gate4d
