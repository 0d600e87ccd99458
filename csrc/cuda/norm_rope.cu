// Kernels of norm_rope.cuh and their registration through torch's stable ABI: an opt-in peer of the Triton kernel, in a
// library of its own (GATE4D_BUILD=cuda). Not run on a GPU yet.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "norm_rope.cuh"

namespace gate4d {

template <>
struct Number<__half> {
  static __device__ __forceinline__ float read(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half write(float x) { return __float2half_rn(x); }
};

template <>
struct Number<__nv_bfloat16> {
  static __device__ __forceinline__ float read(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 write(float x) { return __float2bfloat16_rn(x); }
};

}  // namespace gate4d

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using namespace gate4d;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int THREADS = 128;

struct ThreadWarp {
  struct Lanes {
    Lane own;
    __device__ Lane& operator[](int) { return own; }
  };
  template <class F>
  __device__ void each(F&& f) {
    f(0);
  }
  template <class F>
  __device__ float sum(F&& f) {
    float total = f(0);
    for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    return total;
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS) norm_rope_forward(const __grid_constant__ NormRope f) {
  ThreadWarp warp;
  ThreadWarp::Lanes x{Lane(f, threadIdx.x % WARP)};
  const int64_t warps = (int64_t)gridDim.x * (THREADS / WARP);
  for (int64_t row = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; row < f.batch * f.heads * f.tokens;
       row += warps)
    forward_row<T>(f, row, warp, x);
}

template <class T>
__global__ void __launch_bounds__(THREADS) norm_rope_backward(const __grid_constant__ NormRope f) {
  ThreadWarp warp;
  const Lane empty(f, threadIdx.x % WARP);
  ThreadWarp::Lanes x{empty}, grad{empty}, of_weight{empty}, of_bias{empty};
  const int64_t warps = (int64_t)gridDim.x * (THREADS / WARP);
  const int64_t first = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  for (int64_t row = first; row < f.batch * f.heads * f.tokens; row += warps)
    backward_row<T>(f, row, warp, x, grad, of_weight, of_bias);
  if (f.grad_affine != nullptr) {
    of_weight.own.store_sums(f.grad_affine + first * 2 * f.dim);
    of_bias.own.store_sums(f.grad_affine + (first * 2 + 1) * f.dim);
  }
}

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

const float* floats(const Optional& x) { return x ? (const float*)x->data_ptr() : nullptr; }

NormRope problem(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& positions,
                 const Optional& frequencies, bool norm, double eps) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) % 4 == 0 && x.size(3) <= MAX_HEAD_DIM,
                  "gate4d: norm_rope needs [B, H, N, D] with D a multiple of 4 and at most 256");
  NormRope f{};
  f.x = rows_of(x);
  f.weight = floats(weight), f.bias = floats(bias), f.frequencies = floats(frequencies);
  if (positions) {
    f.positions = positions->data_ptr();
    f.position_batch = positions->size(0) == 1 ? 0 : positions->stride(0);
    f.position_token = positions->stride(1), f.position_axis = positions->stride(2);
    f.long_positions = positions->scalar_type() == ScalarType::Long;
  }
  f.batch = x.size(0), f.heads = x.size(1), f.tokens = x.size(2), f.dim = (int)x.size(3);
  f.norm = norm, f.eps = (float)eps;
  return f;
}

// Enough blocks to fill any GPU of today; a warp takes several rows beyond that.
int64_t blocks_for(const NormRope& f, int64_t most) {
  const int64_t rows = f.batch * f.heads * f.tokens, warps = THREADS / WARP;
  return std::min((rows + warps - 1) / warps, most);
}

template <bool Backward>
void launch(const NormRope& f, const Tensor& x, int64_t blocks) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0, "gate4d: no CUDA stream");
  const auto run = [&](auto forward, auto backward) {
    (Backward ? backward : forward)<<<(unsigned)blocks, THREADS, 0, (cudaStream_t)stream>>>(f);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run(norm_rope_forward<float>, norm_rope_backward<float>);
      break;
    case ScalarType::BFloat16:
      run(norm_rope_forward<__nv_bfloat16>, norm_rope_backward<__nv_bfloat16>);
      break;
    case ScalarType::Half:
      run(norm_rope_forward<__half>, norm_rope_backward<__half>);
      break;
    default:
      STD_TORCH_CHECK(false, "gate4d: norm_rope supports float32, bfloat16 and float16");
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "gate4d: norm_rope: ", cudaGetErrorString(error));
}

void forward(Tensor x, Tensor out, Optional weight, Optional bias, Optional positions, Optional frequencies, bool norm,
             double eps) {
  NormRope f = problem(x, weight, bias, positions, frequencies, norm, eps);
  f.out = rows_of(out);
  if (const int64_t blocks = blocks_for(f, 1 << 20)) launch<false>(f, x, blocks);
}

std::tuple<Tensor, Tensor> backward(Tensor grad_out, Tensor x, Optional weight, Optional positions,
                                    Optional frequencies, bool norm, double eps, bool affine_grads) {
  NormRope f = problem(x, weight, Optional(), positions, frequencies, norm, eps);
  Tensor grad_x = torch::stable::transpose(torch::stable::new_empty(x, {f.batch, f.tokens, f.heads, f.dim}), 1, 2);
  f.grad_out = rows_of(grad_out), f.grad_x = rows_of(grad_x);
  const int64_t blocks = blocks_for(f, affine_grads ? 1024 : 1 << 20);
  Tensor sums =
      torch::stable::new_empty(x, {affine_grads ? blocks * (THREADS / WARP) : 0, 2, f.dim}, ScalarType::Float);
  f.grad_affine = affine_grads ? (float*)sums.data_ptr() : nullptr;
  if (blocks != 0) launch<true>(f, x, blocks);
  return {grad_x, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gate4d, CUDA, m) {
  m.impl("norm_rope_forward_cuda", TORCH_BOX(&forward));
  m.impl("norm_rope_backward_cuda", TORCH_BOX(&backward));
}
