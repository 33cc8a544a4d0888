// prefill_mlp: what stands between the products of a batched MLP.

#include "prefill.cuh"
#include "scores.cuh"

// prefill_gated: the input of the down projection.
//
// Computes   h = round(skip || act(gate) = 0 ? 0 : act(gate) * up)
// Reference  reference::gate_up after its products; within TOLERANCE and the rounding of h
// Shapes     gate, up (n_tokens, n_rows) f32, their rows stride elements apart; skip (n_tokens, n_rows) u8 or null;
//            h (PLANES, n_tokens, n_rows)
// Grid       (ceil(n_rows / 1024), n_tokens); 256 threads, four rows each
// Bytes      n_tokens * n_rows * (8 + PLANES * sizeof(T))
struct PrefillGatedArgs {
    const float* gate;
    const float* up;
    const uint8_t* skip;
    void* h;
    int64_t stride;
    int32_t n_tokens;
    int32_t n_rows;
    uint32_t activation;
    float threshold;
};

template <typename T>
__device__ __forceinline__ void prefill_gated(const PrefillGatedArgs& a) {
    const int64_t token = blockIdx.y;
    const int64_t plane = static_cast<int64_t>(a.n_tokens) * a.n_rows;
    const float* gate = a.gate + token * a.stride;
    const float* up = a.up + token * a.stride;
    T* h = static_cast<T*>(a.h) + token * a.n_rows;
    wait_for_previous();
    for_columns(
        blockIdx.x * 4 * blockDim.x, a.n_rows,
        [&](int row) {
            const bool skip = a.skip != nullptr && a.skip[token * a.n_rows + row] != 0;
            return make_float2(skip ? 0.0f : activate(a.activation, a.threshold, gate[row]), up[row]);
        },
        [&](int row, float2 v) { store_rounded(h + row, plane, v.x == 0.0f ? 0.0f : v.x * v.y); });
}

extern "C" __global__ __launch_bounds__(256) void prefill_gated_f32(const __grid_constant__ PrefillGatedArgs a) {
    prefill_gated<float>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_gated_f16(const __grid_constant__ PrefillGatedArgs a) {
    prefill_gated<__half>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_gated_bf16(const __grid_constant__ PrefillGatedArgs a) {
    prefill_gated<__nv_bfloat16>(a);
}

// prefill_skip: the rows that decoding would leave out, for every token of a batch.
//
// Computes   skip[t, row] = popcount(w_signs[row] ^ x_signs[t]) > limit(row)
// Source     SparseInfer, arXiv 2411.12692, section 3
// Reference  reference::predict; equal bit for bit
// Shapes     x_signs (n_tokens, n_words), w_signs (n_rows, n_words) u32; limits (n_rows,) u32, or null for the one
//            limit; skip (n_tokens, n_rows) u8
// Grid       (ceil(n_rows / 64), ceil(n_tokens / 64))
// Block      256 threads, a tile of 64 rows by 64 tokens; each thread four rows by four tokens, so that a word from
//            shared memory is used four times
// Bytes      (n_rows * ceil(n_tokens / 64) + n_tokens * ceil(n_rows / 64)) * n_words * 4, mostly from L2
struct PrefillSkipArgs {
    const uint32_t* x_signs;
    const uint32_t* w_signs;
    const uint32_t* limits;
    uint8_t* skip;
    int32_t n_tokens;
    int32_t n_rows;
    int32_t n_words;
    uint32_t limit;
};

extern "C" __global__ __launch_bounds__(256) void prefill_skip(const __grid_constant__ PrefillSkipArgs a) {
    constexpr int TILE = 64;
    constexpr int WORDS = 32;
    // One word more than a row has: the threads of a warp read different rows of the same column.
    __shared__ uint32_t w[TILE][WORDS + 1];
    __shared__ uint32_t x[TILE][WORDS + 1];
    const int first_row = blockIdx.x * TILE;
    const int first_token = blockIdx.y * TILE;
    const int row = threadIdx.x % 16;
    const int token = threadIdx.x / 16;
    uint32_t n_neg[4][4] = {};
    wait_for_previous();

    for (int begin = 0; begin < a.n_words; begin += WORDS) {
        for (int i = threadIdx.x; i < TILE * WORDS; i += blockDim.x) {
            const int line = i / WORDS;
            const int word = begin + i % WORDS;
            const bool in = word < a.n_words;
            const int64_t w_at = static_cast<int64_t>(first_row + line) * a.n_words + word;
            const int64_t x_at = static_cast<int64_t>(first_token + line) * a.n_words + word;
            w[line][i % WORDS] = in && first_row + line < a.n_rows ? a.w_signs[w_at] : 0;
            x[line][i % WORDS] = in && first_token + line < a.n_tokens ? a.x_signs[x_at] : 0;
        }
        __syncthreads();
#pragma unroll 8
        for (int word = 0; word < WORDS; word++) {
            uint32_t rows[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                rows[i] = w[row + 16 * i][word];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t signs = x[token + 16 * j][word];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    n_neg[j][i] += __popc(rows[i] ^ signs);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at_token = first_token + token + 16 * j;
            const int at_row = first_row + row + 16 * i;
            if (at_token < a.n_tokens && at_row < a.n_rows) {
                const uint32_t limit = limit_of(a.limits, a.limit, at_row);
                a.skip[static_cast<int64_t>(at_token) * a.n_rows + at_row] = n_neg[j][i] > limit;
            }
        }
    }
}

// prefill_quantise: RMSNorm of every token in 8 bits, for the predictor.
//
// Computes   n = x / sqrt(mean(x^2) + eps) * weight;  planes[t], scales[t] as scores.cuh makes them of n
// Reference  reference::{rmsnorm, quantise}; equal bit for bit for the same n
// Shapes     x (n_tokens, n_cols) f32; weight (n_cols,) f32; planes (n_tokens, x_planes_words) u32; scales (n_tokens,) f32
// Grid       n_tokens blocks of 256 threads
// Bytes      n_tokens * n_cols * 5; later readings of x come from a cache
// Order      one fixed tree of additions, that of prefill_norm: repeatable bit for bit
struct PrefillQuantiseArgs {
    const float* x;
    const float* weight;
    uint32_t* planes;
    float* scales;
    int32_t n_cols;
    float eps;
};

extern "C" __global__ __launch_bounds__(256) void prefill_quantise(const __grid_constant__ PrefillQuantiseArgs a) {
    __shared__ float sums[WARP];
    __shared__ uint32_t scratch[WARP];
    const int64_t token = blockIdx.x;
    const int n_words = (a.n_cols + WARP - 1) / WARP;
    const float* x = a.x + token * a.n_cols;

    wait_for_previous();
    const float factor = norm_factor(x, a.n_cols, a.eps, sums);
    const float scale = quantise(n_words, a.planes + token * x_planes_words(n_words), scratch, [&](int col) {
        const auto at = [&](int c) { return c < a.n_cols ? x[c] * factor * a.weight[c] : 0.0f; };
        return make_float4(at(col), at(col + 1), at(col + 2), at(col + 3));
    });
    if (threadIdx.x == 0) {
        a.scales[token] = scale;
    }
}

// prefill_skip_scores: the rows that decoding would leave out by their score, for every token of a batch.
//
// Computes   skip[t, row] = score(t, row) < limit(row) * scales[t], as in scores.cuh
// Reference  reference::predict_scores; equal bit for bit
// Shapes     planes (n_tokens, x_planes_words) u32; scales (n_tokens,) f32; signs (n_rows, n_words),
//            low (n_planes - 1, n_rows, n_words) u32; limits (n_rows,) f32, or null for the one limit;
//            skip (n_tokens, n_rows) u8
// Grid       (ceil(n_rows / 64), ceil(n_tokens / SKIP_TOKENS)); 256 threads
// Warp       SCORE_ROWS rows, token by token: the warps of a block share the token, whose planes come from L1
// Bytes      (n_rows * n_planes * ceil(n_tokens / SKIP_TOKENS) * n_words + n_tokens * ceil(n_rows / 64) * n_words * 8)
//            * 4, mostly from L2
struct PrefillSkipScoresArgs {
    const uint32_t* planes;
    const float* scales;
    const uint32_t* signs;
    const uint32_t* low;
    const uint32_t* limits;
    uint8_t* skip;
    int32_t n_tokens;
    int32_t n_rows;
    int32_t n_words;
    uint32_t limit;
    uint32_t n_planes;
};

// Tokens of a block.
constexpr int SKIP_TOKENS = 64;

extern "C" __global__ __launch_bounds__(256) void prefill_skip_scores(
    const __grid_constant__ PrefillSkipScoresArgs a
) {
    const BitRows bits = {a.signs, a.low, static_cast<int>(a.n_planes), a.n_rows, a.n_words};
    const int first = (blockIdx.x * (blockDim.x / WARP) + warp_id()) * SCORE_ROWS;
    wait_for_previous();
    if (first >= a.n_rows) {
        return;
    }
    const int row = min(first + lane_id() / 4, a.n_rows - 1);
    const bool writes = lane_id() % 4 == 0 && first + lane_id() / 4 < a.n_rows;
    const uint32_t threshold = limit_of(a.limits, a.limit, row);
    const int end = min(a.n_tokens, static_cast<int>(blockIdx.y + 1) * SKIP_TOKENS);
    for (int token = blockIdx.y * SKIP_TOKENS; token < end; token++) {
        const int32_t score = bits.score(row, a.planes + static_cast<int64_t>(token) * x_planes_words(a.n_words));
        if (writes) {
            a.skip[static_cast<int64_t>(token) * a.n_rows + row] = !is_kept(score, threshold, a.scales[token]);
        }
    }
}
