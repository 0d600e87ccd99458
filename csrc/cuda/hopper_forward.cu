// Kernels of hopper_forward.cuh, an experiment that benchmarks/gpu builds as a library of its own. It needs sm_90a and
// has not run on a GPU.

#include "hopper_ptx.cuh"
// Included second: it is written in the functions of the first.
#include "hopper_forward.cuh"

namespace {

using namespace gate4d::hopper;

template <class T, int D, int GATE>
__global__ void __launch_bounds__(THREADS, 1) hopper_forward(const __grid_constant__ Forward f) {
  extern __shared__ uint8_t memory[];
  const uint32_t base = ((uint32_t)__cvta_generic_to_shared(memory) + 1023) / 1024 * 1024;
  const Place place{(int)blockIdx.x, (int)blockIdx.y, (int)blockIdx.z};
  forward_block<T, D, GATE>(f, place, threadIdx.x, base);
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// strides: of batch, head and token, in elements.
bool describe(TensorMap& map, Encode encode, bool half, const void* data, const int64_t* sizes,
              const int64_t* strides) {
  const cuuint64_t dims[4] = {(cuuint64_t)sizes[3], (cuuint64_t)sizes[2], (cuuint64_t)sizes[1], (cuuint64_t)sizes[0]};
  const cuuint64_t steps[3] = {(cuuint64_t)strides[2] * 2, (cuuint64_t)strides[1] * 2, (cuuint64_t)strides[0] * 2};
  const cuuint32_t box[4] = {BOX, BLOCK_N, 1, 1}, ones[4] = {1, 1, 1, 1};
  return encode(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                const_cast<void*>(data), dims, steps, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T, int D, int GATE>
cudaError_t launch(const Forward& f, int batch, cudaStream_t stream) {
  constexpr int BYTES = Memory<D>::BYTES + 1024;
  const cudaError_t error =
      cudaFuncSetAttribute(hopper_forward<T, D, GATE>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return error;
  const dim3 grid((f.queries + BLOCK_M - 1) / BLOCK_M, f.heads, batch);
  hopper_forward<T, D, GATE><<<grid, THREADS, BYTES, stream>>>(f);
  return cudaGetLastError();
}

template <class T, int D>
cudaError_t launch(const Forward& f, int batch, cudaStream_t stream) {
  if (f.key_scores == nullptr) return launch<T, D, NONE>(f, batch, stream);
  if (f.query_score == nullptr) return launch<T, D, KEYS>(f, batch, stream);
  return launch<T, D, PAIRS>(f, batch, stream);
}

}  // namespace

// half: fp16, else bf16. sizes: B, H, Nq, Nk, D (64 or 128). strides: of batch, head, token (16-byte multiples) of q,
// k, v and out, of the batch of bounds and reach. Everything else as in `Forward`. Returns a cudaError_t.
extern "C" int gate4d_hopper_forward(int half, const int64_t* sizes, const int64_t* strides, const void* q,
                                     const void* k, const void* v, const float* query_score, const float* key_scores,
                                     const int* bounds, const int* reach, void* out, float* lse, float exponent_scale,
                                     void* stream) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || symbol == nullptr) return error != cudaSuccess ? error : cudaErrorNotSupported;
  const Encode encode = (Encode)symbol;
  const int64_t queries[4] = {sizes[0], sizes[1], sizes[2], sizes[4]};
  const int64_t keys[4] = {sizes[0], sizes[1], sizes[3], sizes[4]};
  Forward f{};
  if (!describe(f.q, encode, half, q, queries, strides) || !describe(f.k, encode, half, k, keys, strides + 3) ||
      !describe(f.v, encode, half, v, keys, strides + 6))
    return cudaErrorInvalidValue;
  f.query_score = query_score, f.key_scores = key_scores, f.bounds = bounds, f.reach = reach, f.out = out, f.lse = lse;
  f.out_batch = strides[9], f.out_head = strides[10], f.out_token = strides[11];
  f.bounds_batch = strides[12], f.reach_batch = strides[13];
  f.heads = (int)sizes[1], f.queries = (int)sizes[2], f.keys = (int)sizes[3], f.exponent_scale = exponent_scale;
  const int batch = (int)sizes[0];
  const cudaStream_t on = (cudaStream_t)stream;
  if (sizes[4] == 64) return half ? launch<fp16, 64>(f, batch, on) : launch<bf16, 64>(f, batch, on);
  if (sizes[4] == 128) return half ? launch<fp16, 128>(f, batch, on) : launch<bf16, 128>(f, batch, on);
  return cudaErrorInvalidValue;
}
