// prefill_low_rank: the rows that decoding would leave out by a score of low rank, for every token of a batch.

#include "low_rank.cuh"

// prefill_inner: products with the first factor.
//
// Computes   inner[t, k] as in low_rank.cuh
// Reference  reference::ordered_dot; equal bit for bit
// Shapes     x (n_tokens, n_cols), inner (n_tokens, rank) f32; fc1 (rank, n_cols) f16
// Grid       (rank, n_tokens); 128 threads, shared memory for the sums of the segments
// Warp       segments in turn
// Bytes      rank * n_cols * 2, for later tokens from L2; n_tokens * n_cols * 4
struct PrefillInnerArgs {
    const float* x;
    const __half* fc1;
    float* inner;
    int32_t rank;
    int32_t n_cols;
    uint32_t relu;
};

extern "C" __global__ __launch_bounds__(128) void prefill_inner(const __grid_constant__ PrefillInnerArgs a) {
    extern __shared__ float segment_sums[];
    const int64_t token = blockIdx.y;
    const __half* row = a.fc1 + static_cast<int64_t>(blockIdx.x) * a.n_cols;
    const float* x = a.x + token * a.n_cols;
    if (a.n_cols % PER_LOAD<__half> == 0 && threadIdx.x == 0) {
        prefetch_l2(row, a.n_cols * sizeof(__half));
    }
    wait_for_previous();
    for (int segment = warp_id(); segment < n_segments(a.n_cols); segment += blockDim.x / WARP) {
        segment_sums[segment * DOT_CHAINS + lane_id()] = segment_sum(segment, a.n_cols, [&](int, int col) {
            return __fmul_rn(__half2float(__ldg(row + col)), __ldcg(x + col));
        });
    }
    __syncthreads();
    if (warp_id() == 0) {
        const float dot = add_segments(segment_sums, n_segments(a.n_cols));
        if (lane_id() == 0) {
            a.inner[token * a.rank + blockIdx.x] = inner_of(dot, a.relu);
        }
    }
}

// prefill_skip_low_rank: rows below their threshold.
//
// Computes   skip[t, row] = score(t, row) < limit(row), as in low_rank.cuh
// Reference  reference::predict_low_rank; equal bit for bit
// Shapes     inner (n_tokens, rank) f32; fc2, signs and scales as in low_rank.cuh; planes (n_tokens, x_planes_words) u32 and
//            x_scales (n_tokens,) f32, for a residual; limits (n_rows,) f32, or null for the one limit;
//            skip (n_tokens, n_rows) u8
// Grid       (ceil(n_rows / 32), n_tokens); 128 threads
// Warp       SCORE_ROWS rows
// Bytes      n_rows * (rank * 2 + n_words * 4 with a residual), for later tokens from L2
struct PrefillSkipLowRankArgs {
    LowRank factors;
    const float* inner;
    const uint32_t* planes;
    const float* x_scales;
    const uint32_t* signs;
    const uint32_t* limits;
    uint8_t* skip;
    int32_t n_rows;
    int32_t n_words;
    uint32_t limit;
};

extern "C" __global__ __launch_bounds__(128) void prefill_skip_low_rank(
    const __grid_constant__ PrefillSkipLowRankArgs a
) {
    const int64_t token = blockIdx.y;
    const int first = (blockIdx.x * (blockDim.x / WARP) + warp_id()) * SCORE_ROWS;
    const BitRows residual = {a.signs, nullptr, 1, a.n_rows, a.n_words};
    if (a.factors.rank % PER_LOAD<__half> == 0 && lane_id() == 0 && first < a.n_rows) {
        const int n_rows = min(SCORE_ROWS, a.n_rows - first);
        prefetch_l2(
            a.factors.fc2 + static_cast<int64_t>(first) * a.factors.rank, n_rows * a.factors.rank * sizeof(__half)
        );
    }
    wait_for_previous();
    if (first >= a.n_rows) {
        return;
    }
    const int row = min(first + lane_id() / 4, a.n_rows - 1);
    const float x_scale = a.factors.scales != nullptr ? a.x_scales[token] : 0.0f;
    const uint32_t* planes = a.planes + token * x_planes_words(a.n_words);
    const bool keeps = keeps_low_rank(
        a.factors, residual, row, a.inner + token * a.factors.rank, planes, x_scale, limit_of(a.limits, a.limit, row)
    );
    if (lane_id() % 4 == 0 && first + lane_id() / 4 < a.n_rows) {
        a.skip[token * a.n_rows + row] = !keeps;
    }
}
