// low_rank: scores of a predictor of two thin matrices, whose sums have one order on all machines.
//
// Computes   inner[k] = ordered_dot(fc1[k], x), with relu 0 where that is below zero;
//            score[r] = ordered_dot(fc2[r], inner) + (s[r] * unit) * scales[r], the second part with a residual alone: s as
//            in scores.cuh, of its signs and x in 8 bits, unit = 1 / scale or 0
// Source     Deja Vu, arXiv 2310.17157; PowerInfer, arXiv 2312.12456, for relu
// Reference  reference::{ordered_dot, low_rank_scores}; equal bit for bit for the same x
// Shapes     fc1 (rank, n_cols), fc2 (n_rows, rank) f16, row-major; signs (n_rows, n_words) u32, scales (n_rows,) f32
// Sums       DOT_CHAINS = 32 of a dot: column c in sum c mod 32, of products rounded before they are added, as not every
//            machine does both in one step; then halves of the sums are added
// Warp       fc1: threads of a block multiply, one warp adds, lane j sum j. fc2: SCORE_ROWS rows, four lanes for each with
//            eight sums each, so that a lane reads 16 bytes at a time
// Order      each sum's columns ascend: repeatable bit for bit

#pragma once

#include "scores.cuh"

constexpr int DOT_CHAINS = 32;
// Sums of a lane, of four that share a row.
constexpr int LANE_CHAINS = DOT_CHAINS / 4;

struct LowRank {
    const __half* fc1;
    const __half* fc2;
    const float* scales;  // of the residual; null without
    int32_t rank;         // 0 where rows are predicted otherwise
    uint32_t relu;
};

// Four products, rounded.
__device__ __forceinline__ float4 products(float4 w, float4 x) {
    return make_float4(__fmul_rn(w.x, x.x), __fmul_rn(w.y, x.y), __fmul_rn(w.z, x.z), __fmul_rn(w.w, x.w));
}

// What a dot product's terms (n,), in shared memory, add up to; on every lane of the warp that calls.
__device__ __forceinline__ float ordered_sum(const float* terms, int n) {
    float sum = 0.0f;
#pragma unroll 16
    for (int col = lane_id(); col < n; col += WARP) {
        sum = __fadd_rn(sum, terms[col]);
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, offset));
    }
    return sum;
}

// inner[k] from its dot product.
__device__ __forceinline__ float inner_of(float dot, uint32_t relu) { return relu != 0 && dot < 0.0f ? 0.0f : dot; }

// What one step of an input in 8 bits is, for its scale.
__device__ __forceinline__ float unit_of(float scale) { return scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f; }

// The product of row (rank,), the same for the four lanes from a multiple of 4 on, with inner (rank,). Where rank is a
// multiple of 8, both lie at multiples of 16 bytes.
__device__ __forceinline__ float ordered_dot(const __half* row, int rank, const float* inner) {
    float sums[LANE_CHAINS] = {};
    const int first = lane_id() % 4 * LANE_CHAINS;
    if (rank % LANE_CHAINS == 0) {
#pragma unroll 8
        for (int col = first; col < rank; col += DOT_CHAINS) {
            float w[LANE_CHAINS];
            unpack<__half>(load_weights(row + col), w);
#pragma unroll
            for (int i = 0; i < LANE_CHAINS; i += 4) {
                const float4 x = *reinterpret_cast<const float4*>(inner + col + i);
                const float4 terms = products(make_float4(w[i], w[i + 1], w[i + 2], w[i + 3]), x);
                sums[i] = __fadd_rn(sums[i], terms.x);
                sums[i + 1] = __fadd_rn(sums[i + 1], terms.y);
                sums[i + 2] = __fadd_rn(sums[i + 2], terms.z);
                sums[i + 3] = __fadd_rn(sums[i + 3], terms.w);
            }
        }
    } else {
        for (int col = first; col < rank; col += DOT_CHAINS) {
#pragma unroll
            for (int i = 0; i < LANE_CHAINS; i++) {
                if (col + i < rank) {
                    sums[i] = __fadd_rn(sums[i], __fmul_rn(__half2float(row[col + i]), inner[col + i]));
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < LANE_CHAINS; i++) {
        sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(0xffffffffu, sums[i], 2));
        sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(0xffffffffu, sums[i], 1));
    }
#pragma unroll
    for (int half = LANE_CHAINS / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; i++) {
            sums[i] = __fadd_rn(sums[i], sums[i + half]);
        }
    }
    return sums[0];
}

// True if row is computed, the same for the four lanes from a multiple of 4 on. x_planes and x_scale are for a residual, the
// signs of which residual has. All lanes of a warp call.
__device__ __forceinline__ bool keeps_low_rank(
    const LowRank& w, const BitRows& residual, int row, const float* inner, const uint32_t* x_planes, float x_scale,
    uint32_t threshold
) {
    float score = ordered_dot(w.fc2 + static_cast<int64_t>(row) * w.rank, w.rank, inner);
    if (w.scales != nullptr) {
        const float sum = __int2float_rn(residual.score(row, x_planes));
        score = __fadd_rn(score, __fmul_rn(__fmul_rn(sum, unit_of(x_scale)), __ldg(w.scales + row)));
    }
    // One that is no number keeps the row.
    return !(score < __uint_as_float(threshold));
}
