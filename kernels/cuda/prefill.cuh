// What the kernels over batches of tokens share.
//
// Tensor cores multiply f16 by f16 or bf16 by bf16, so that inputs are rounded to the type of the weights. An f16 keeps
// 11 bits, enough for logits; a bf16 keeps 8, which is not. Batched inputs in bf16 are therefore two planes, the
// rounded value and the rounded rest, whose products with the same weights add up: 16 bits, twice the arithmetic.

#pragma once

#include "matrix.cuh"

constexpr float F16_MAX = 65504.0f;

// Planes of a batched input: it is their sum.
template <typename T>
constexpr int PLANES = 1;
template <>
inline constexpr int PLANES<__nv_bfloat16> = 2;

// v in the planes at out, plane elements apart. An f16 saturates, as one infinity would turn a token into NaN.
__device__ __forceinline__ void store_rounded(float* out, int64_t, float v) { *out = v; }
__device__ __forceinline__ void store_rounded(__half* out, int64_t, float v) {
    const float upper = v > F16_MAX ? F16_MAX : v;
    *out = __float2half_rn(upper < -F16_MAX ? -F16_MAX : upper);
}
__device__ __forceinline__ void store_rounded(__nv_bfloat16* out, int64_t plane, float v) {
    const __nv_bfloat16 high = __float2bfloat16_rn(v);
    out[0] = high;
    out[plane] = __float2bfloat16_rn(v - __bfloat162float(high));
}

// Factor of RMSNorm for the token x (n_cols,), on every thread of the block: one fixed tree of additions, so that all who
// normalise a batch have the same. scratch: one float for each warp.
__device__ __forceinline__ float norm_factor(const float* x, int n_cols, float eps, float* scratch) {
    float squares = 0.0f;
#pragma unroll 4
    for (int col = threadIdx.x; col < n_cols; col += blockDim.x) {
        squares = fmaf(x[col], x[col], squares);
    }
    return 1.0f / sqrtf(block_sum(squares, scratch) / static_cast<float>(n_cols) + eps);
}

// store(col, load(col)) for four columns of each thread from first on, neighbours by neighbours. All loads come before
// the first store, so that they are in flight together.
template <typename Load, typename Store>
__device__ __forceinline__ void for_columns(int first, int n_cols, const Load& load, const Store& store) {
    decltype(load(0)) values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = first + i * blockDim.x + threadIdx.x;
        if (col < n_cols) {
            values[i] = load(col);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = first + i * blockDim.x + threadIdx.x;
        if (col < n_cols) {
            store(col, values[i]);
        }
    }
}
