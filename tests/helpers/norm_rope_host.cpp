// The arithmetic of csrc/cuda/norm_rope.cuh on the CPU: a warp is 32 lanes, one after the other. Sums are added in the
// order of the GPU's shuffles.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../../csrc/cuda/norm_rope.cuh"

using namespace gate4d;

struct HostWarp {
  using Lanes = std::vector<Lane>;
  template <class F>
  void each(F&& f) {
    for (int i = 0; i < WARP; ++i) f(i);
  }
  template <class F>
  float sum(F&& f) {
    float totals[WARP];
    for (int i = 0; i < WARP; ++i) totals[i] = f(i);
    for (int step = WARP / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) totals[i] += totals[i + step];
    return totals[0];
  }
};

template <class T>
void run(const NormRope& f, bool backward, int warps) {
  for (int first = 0; first < warps; ++first) {
    HostWarp warp;
    std::vector<Lane> empty;
    for (int i = 0; i < WARP; ++i) empty.emplace_back(f, i);
    auto x = empty, grad = empty, of_weight = empty, of_bias = empty;
    for (int64_t row = first; row < f.batch * f.heads * f.tokens; row += warps) {
      if (backward) backward_row<T>(f, row, warp, x, grad, of_weight, of_bias);
      else forward_row<T>(f, row, warp, x);
    }
    if (f.grad_affine == nullptr) continue;
    for (int i = 0; i < WARP; ++i) {
      of_weight[i].store_sums(f.grad_affine + first * 2 * f.dim);
      of_bias[i].store_sums(f.grad_affine + (first * 2 + 1) * f.dim);
    }
  }
}

static Rows rows(void* data, const int64_t* s) { return {data, s[0], s[1], s[2], s[3]}; }

// sizes: B, H, N, D; strides: of x, out, grad_out, grad_x (4 each), positions (3).
extern "C" void norm_rope(int type, int backward, int warps, const int64_t* sizes, const int64_t* strides, void* x,
                          void* out, void* grad_out, void* grad_x, const float* weight, const float* bias,
                          const void* positions, int long_positions, const float* frequencies, int norm, float eps,
                          float* grad_affine) {
  NormRope f{};
  f.x = rows(x, strides), f.out = rows(out, strides + 4);
  f.grad_out = rows(grad_out, strides + 8), f.grad_x = rows(grad_x, strides + 12);
  f.weight = weight, f.bias = bias, f.positions = positions, f.frequencies = frequencies, f.grad_affine = grad_affine;
  f.position_batch = strides[16], f.position_token = strides[17], f.position_axis = strides[18];
  f.batch = sizes[0], f.heads = sizes[1], f.tokens = sizes[2], f.dim = (int)sizes[3];
  f.long_positions = long_positions, f.norm = norm, f.eps = eps;
  if (type == 0) run<float>(f, backward, warps);
  if (type == 1) run<torch::headeronly::BFloat16>(f, backward, warps);
  if (type == 2) run<torch::headeronly::Half>(f, backward, warps);
}
