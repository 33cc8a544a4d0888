// low_rank: scores of a predictor of two thin matrices, whose sums have one order on all machines.
//
// Computes   inner[k] = ordered_dot(fc1[k], x), with relu 0 where that is below zero;
//            score[r] = ordered_dot(fc2[r], inner) + (s[r] * unit) * scales[r], the second part with a residual alone: s as
//            in scores.cuh, of its signs and x in 8 bits, unit = 1 / scale or 0
// Source     Deja Vu, arXiv 2310.17157; PowerInfer, arXiv 2312.12456, for relu
// Reference  reference::{ordered_dot, low_rank_scores}; equal bit for bit for the same x
// Shapes     fc1 (rank, n_cols), fc2 (n_rows, rank) f16, row-major; signs (n_rows, n_words) u32, scales (n_rows,) f32
// Sums       DOT_CHAINS = 32 of each DOT_SEGMENT = 256 columns of a dot: column c in sum c mod 32, of products rounded
//            before they are added, as not every machine does both in one step; the segments' sums are added in order,
//            then halves of those
// Warp       fc1: a segment, lane j sum j; one warp adds those of all segments. fc2: SCORE_ROWS rows, four lanes for each
//            with eight sums each, so that a lane reads 16 bytes at a time
// Order      each sum's columns ascend: repeatable bit for bit

#pragma once

#include "scores.cuh"

constexpr int DOT_CHAINS = 32;
constexpr int DOT_SEGMENT = 256;
// Terms of a sum of a segment.
constexpr int SEGMENT_TERMS = DOT_SEGMENT / DOT_CHAINS;
// Sums of a lane, of four that share a row.
constexpr int LANE_CHAINS = DOT_CHAINS / 4;

__host__ __device__ constexpr int n_segments(int n) { return (n + DOT_SEGMENT - 1) / DOT_SEGMENT; }

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

// This lane's sum of a segment of a dot product of n columns: its i-th term is term(i, col). Nothing is added past the last
// column: no sum is -0.
template <typename Term>
__device__ __forceinline__ float segment_sum(int segment, int n, const Term& term) {
    float terms[SEGMENT_TERMS];
#pragma unroll
    for (int i = 0; i < SEGMENT_TERMS; i++) {
        const int col = segment * DOT_SEGMENT + i * DOT_CHAINS + lane_id();
        terms[i] = col < n ? term(i, col) : 0.0f;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SEGMENT_TERMS; i++) {
        sum = __fadd_rn(sum, terms[i]);
    }
    return sum;
}

// The dot product, on every lane of the warp that calls, from the sums of its segments (n_segments, DOT_CHAINS) in shared
// memory.
__device__ __forceinline__ float add_segments(const float* sums, int n_segments) {
    float sum = 0.0f;
#pragma unroll 4
    for (int segment = 0; segment < n_segments; segment++) {
        sum = __fadd_rn(sum, sums[segment * DOT_CHAINS + lane_id()]);
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

// The product of a row of fc2 (rank,) with inner (rank,): sums of the lane, of four from a multiple of 4 on that share the
// row and read 16 bytes of it at a time.
struct RowDot {
    float sums[LANE_CHAINS] = {};

    __device__ __forceinline__ static int first_column(int segment) {
        return segment * DOT_SEGMENT + lane_id() % 4 * LANE_CHAINS;
    }

    // The lane's columns of a segment of row, zeros past the last; for a rank in whole 16 bytes.
    __device__ __forceinline__ static void load(
        const LowRank& w, int row, int segment, uint4 (&weights)[SEGMENT_TERMS]
    ) {
        const __half* from = w.fc2 + static_cast<int64_t>(row) * w.rank;
#pragma unroll
        for (int i = 0; i < SEGMENT_TERMS; i++) {
            const int col = first_column(segment) + i * DOT_CHAINS;
            weights[i] = col < w.rank ? load_weights(from + col) : make_uint4(0, 0, 0, 0);
        }
    }

    // PADDED: inner goes on with zeros to a multiple of DOT_CHAINS.
    template <bool PADDED = false>
    __device__ __forceinline__ void add(
        const LowRank& w, int segment, const uint4 (&weights)[SEGMENT_TERMS], const float* inner
    ) {
        float of_segment[LANE_CHAINS] = {};
#pragma unroll
        for (int i = 0; i < SEGMENT_TERMS; i++) {
            if (PADDED && segment * DOT_SEGMENT + i * DOT_CHAINS >= w.rank) {
                break;
            }
            const int col = first_column(segment) + i * DOT_CHAINS;
            float row[LANE_CHAINS];
            unpack<__half>(weights[i], row);
            if (PADDED || col < w.rank) {
#pragma unroll
                for (int k = 0; k < LANE_CHAINS; k += 4) {
                    const float4 x = *reinterpret_cast<const float4*>(inner + col + k);
                    const float4 terms = products(make_float4(row[k], row[k + 1], row[k + 2], row[k + 3]), x);
                    of_segment[k] = __fadd_rn(of_segment[k], terms.x);
                    of_segment[k + 1] = __fadd_rn(of_segment[k + 1], terms.y);
                    of_segment[k + 2] = __fadd_rn(of_segment[k + 2], terms.z);
                    of_segment[k + 3] = __fadd_rn(of_segment[k + 3], terms.w);
                }
            }
        }
        add_sums(of_segment);
    }

    // The same for any rank, element by element.
    __device__ __forceinline__ void add_any(const LowRank& w, int row, int segment, const float* inner) {
        const __half* from = w.fc2 + static_cast<int64_t>(row) * w.rank;
        float of_segment[LANE_CHAINS] = {};
#pragma unroll 1
        for (int i = 0; i < SEGMENT_TERMS; i++) {
            const int col = first_column(segment) + i * DOT_CHAINS;
#pragma unroll
            for (int k = 0; k < LANE_CHAINS; k++) {
                if (col + k < w.rank) {
                    of_segment[k] = __fadd_rn(of_segment[k], __fmul_rn(__half2float(from[col + k]), inner[col + k]));
                }
            }
        }
        add_sums(of_segment);
    }

    __device__ __forceinline__ void add_sums(const float (&of_segment)[LANE_CHAINS]) {
#pragma unroll
        for (int k = 0; k < LANE_CHAINS; k++) {
            sums[k] = __fadd_rn(sums[k], of_segment[k]);
        }
    }

    // The product, the same on the four lanes. All lanes of a warp call.
    __device__ __forceinline__ float total() const {
        float sum[LANE_CHAINS];
#pragma unroll
        for (int k = 0; k < LANE_CHAINS; k++) {
            sum[k] = __fadd_rn(sums[k], __shfl_xor_sync(0xffffffffu, sums[k], 2));
            sum[k] = __fadd_rn(sum[k], __shfl_xor_sync(0xffffffffu, sum[k], 1));
        }
#pragma unroll
        for (int half = LANE_CHAINS / 2; half > 0; half /= 2) {
#pragma unroll
            for (int k = 0; k < half; k++) {
                sum[k] = __fadd_rn(sum[k], sum[k + half]);
            }
        }
        return sum[0];
    }
};

// What the residual adds to a score: its own of a row, for the scales of the input and of the row.
__device__ __forceinline__ float residual_score(int32_t score, float x_scale, float scale) {
    return __fmul_rn(__fmul_rn(__int2float_rn(score), unit_of(x_scale)), scale);
}

// True if a row of this score is computed, for the bits of its threshold. One that is no number keeps it.
__device__ __forceinline__ bool passes(float score, uint32_t threshold) {
    return !(score < __uint_as_float(threshold));
}

// True if row is computed, the same for the four lanes from a multiple of 4 on. x_planes and x_scale are for a residual, the
// signs of which residual has. All lanes of a warp call.
__device__ __forceinline__ bool keeps_low_rank(
    const LowRank& w, const BitRows& residual, int row, const float* inner, const uint32_t* x_planes, float x_scale,
    uint32_t threshold
) {
    RowDot dot;
#pragma unroll 1
    for (int segment = 0; segment < n_segments(w.rank); segment++) {
        if (w.rank % LANE_CHAINS == 0) {
            uint4 weights[SEGMENT_TERMS];
            RowDot::load(w, row, segment, weights);
            dot.add(w, segment, weights, inner);
        } else {
            dot.add_any(w, row, segment, inner);
        }
    }
    float score = dot.total();
    if (w.scales != nullptr) {
        const float added = residual_score(residual.score(row, x_planes), x_scale, __ldg(w.scales + row));
        score = __fadd_rn(score, added);
    }
    return passes(score, threshold);
}
