// prefill_gemm: products of a batch with a matrix, where cuBLASLt is not at hand.
//
// Computes   y = x wᵀ with w (n_out, n_in); as _t, y = x w with w (n_in, n_out). += with accumulate
// Reference  reference::{matmul, matmul_t} over rounded x; within TOLERANCE (sum order)
// Shapes     x (PLANES, n_tokens, n_in) of the type of w; w row-major; y (n_tokens, n_out) f32
// Grid       (ceil(n_tokens / TOKENS), ceil(n_out / OUTS)): tiles that share weights run side by side
// Order      each sum in one fixed order, no atomics: repeatable bit for bit
// Measured   H100, 512 tokens of 7B f16: 158 to 234 TFLOP/s, where prefill_gemm_wide is not; record 2026-11-25-h100-prompt

#include "prefill.cuh"

struct PrefillGemmArgs {
    const void* x;
    const void* w;
    float* y;
    int32_t n_tokens;
    int32_t n_in;
    int32_t n_out;
    int32_t accumulate;
};

__device__ __forceinline__ void store_product(const PrefillGemmArgs& a, int token, int out, float v) {
    if (token < a.n_tokens && out < a.n_out) {
        float& y = a.y[static_cast<int64_t>(token) * a.n_out + out];
        y = a.accumulate ? y + v : v;
    }
}

// Two neighbours, in one store where it is aligned.
__device__ __forceinline__ void store_products(const PrefillGemmArgs& a, int token, int out, float v0, float v1) {
    if (a.n_out % 2 != 0 || reinterpret_cast<uintptr_t>(a.y) % sizeof(float2) != 0) {
        store_product(a, token, out, v0);
        store_product(a, token, out + 1, v1);
    } else if (token < a.n_tokens && out < a.n_out) {
        float2& y = *reinterpret_cast<float2*>(a.y + static_cast<int64_t>(token) * a.n_out + out);
        const float2 old = a.accumulate ? y : make_float2(0.0f, 0.0f);
        y = make_float2(old.x + v0, old.y + v1);
    }
}

// Tensor cores: f16 and bf16.
//
// Needs      as ALIGNED: rows of x and w multiples of 16 bytes, both 16-byte aligned; else anything
// Block      WARPS_X * WARPS_W warps over a tile of TOKENS x OUTS; shared memory: STAGES tiles of DEPTH columns of x
//            and w on their way, rows padded by 16 bytes so that the rows of a matrix lie in different banks
// Warp       TOKENS / WARPS_X by OUTS / WARPS_W of the tile, in registers
// Bytes      weights once for each TOKENS tokens, x once for each OUTS outputs, mostly from L2
constexpr int DEPTH = 32;

template <int TOKENS, int OUTS, bool TRANSPOSED>
struct GemmStage {
    static constexpr int W_ROWS = TRANSPOSED ? DEPTH : OUTS;
    static constexpr int W_COLS = TRANSPOSED ? OUTS : DEPTH;
    uint16_t x[TOKENS][DEPTH + 8];
    uint16_t w[W_ROWS][W_COLS + 8];
};

// Rows first_row.. and columns first_col.. of a matrix into a tile, zeros outside of the matrix.
template <bool ALIGNED, int N_THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_part(
    uint16_t (&tile)[ROWS][COLS + 8], const uint16_t* matrix, int n_rows, int n_cols, int first_row, int first_col
) {
    constexpr int CHUNKS = COLS / 8;
    static_assert(ROWS * CHUNKS % N_THREADS == 0);
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / N_THREADS; i++) {
        const int chunk = i * N_THREADS + threadIdx.x;
        const int row = chunk / CHUNKS;
        const int col = chunk % CHUNKS * 8;
        const int from_row = first_row + row;
        const int from_col = first_col + col;
        if constexpr (ALIGNED) {
            const bool in = from_row < n_rows && from_col < n_cols;
            const int64_t at = in ? static_cast<int64_t>(from_row) * n_cols + from_col : 0;
            copy_async(&tile[row][col], matrix + at, in);
        } else {
            const int64_t at = static_cast<int64_t>(from_row) * n_cols + from_col;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                tile[row][col + j] = from_row < n_rows && from_col + j < n_cols ? matrix[at + j] : 0;
            }
        }
    }
}

template <typename T, int TOKENS, int OUTS, int WARPS_X, int WARPS_W, int STAGES, bool TRANSPOSED, bool ALIGNED>
__device__ __forceinline__ void prefill_gemm(const PrefillGemmArgs& a) {
    constexpr int N_THREADS = WARPS_X * WARPS_W * WARP;
    constexpr int WARP_TOKENS = TOKENS / WARPS_X;
    constexpr int WARP_OUTS = OUTS / WARPS_W;
    static_assert(WARP_TOKENS % 16 == 0 && WARP_OUTS % 16 == 0);
    using Stage = GemmStage<TOKENS, OUTS, TRANSPOSED>;
    extern __shared__ float4 shared[];
    Stage* stages = reinterpret_cast<Stage*>(shared);

    const int first_token = blockIdx.x * TOKENS;
    const int first_out = blockIdx.y * OUTS;
    const int warp_token = warp_id() % WARPS_X * WARP_TOKENS;
    const int warp_out = warp_id() / WARPS_X * WARP_OUTS;
    const int n_steps = (a.n_in + DEPTH - 1) / DEPTH;
    const int64_t plane = static_cast<int64_t>(a.n_tokens) * a.n_in;
    const uint16_t* w = static_cast<const uint16_t*>(a.w);

    // Turn by turn through the columns of x, plane after plane.
    const int n_turns = n_steps * PLANES<T>;
    const auto load = [&](int turn) {
        if (turn < n_turns) {
            Stage& stage = stages[turn % STAGES];
            const uint16_t* x = static_cast<const uint16_t*>(a.x) + turn / n_steps * plane;
            const int first_in = turn % n_steps * DEPTH;
            load_part<ALIGNED, N_THREADS, TOKENS, DEPTH>(stage.x, x, a.n_tokens, a.n_in, first_token, first_in);
            if constexpr (TRANSPOSED) {
                load_part<ALIGNED, N_THREADS, DEPTH, OUTS>(stage.w, w, a.n_in, a.n_out, first_in, first_out);
            } else {
                load_part<ALIGNED, N_THREADS, OUTS, DEPTH>(stage.w, w, a.n_out, a.n_in, first_out, first_in);
            }
        }
        commit_copies();
    };

    wait_for_previous();
#pragma unroll
    for (int turn = 0; turn < STAGES - 1; turn++) {
        load(turn);
    }
    float sums[WARP_TOKENS / 16][WARP_OUTS / 8][4] = {};
    for (int turn = 0; turn < n_turns; turn++) {
        wait_copies<STAGES - 2>();
        // This turn's tile is there for every warp, and nobody reads the one before any more.
        __syncthreads();
        load(turn + STAGES - 1);
        const Stage& stage = stages[turn % STAGES];
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth += 16) {
            uint32_t x[WARP_TOKENS / 16][4];
            uint32_t b[WARP_OUTS / 16][4];
#pragma unroll
            for (int m = 0; m < WARP_TOKENS / 16; m++) {
                load_matrices(x[m], &stage.x[warp_token + m * 16 + lane_id() % 16][depth + lane_id() / 16 * 8]);
            }
#pragma unroll
            for (int n = 0; n < WARP_OUTS / 16; n++) {
                const int out = warp_out + n * 16;
                if constexpr (TRANSPOSED) {
                    load_matrices_t(b[n], &stage.w[depth + lane_id() % 16][out + lane_id() / 16 * 8]);
                } else {
                    const int row = out + lane_id() % 8 + lane_id() / 16 * 8;
                    load_matrices(b[n], &stage.w[row][depth + lane_id() / 8 % 2 * 8]);
                }
            }
#pragma unroll
            for (int m = 0; m < WARP_TOKENS / 16; m++) {
#pragma unroll
                for (int n = 0; n < WARP_OUTS / 16; n++) {
                    multiply_matrices<T>(sums[m][2 * n], x[m], b[n][0], b[n][1]);
                    multiply_matrices<T>(sums[m][2 * n + 1], x[m], b[n][2], b[n][3]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < WARP_TOKENS / 16; m++) {
#pragma unroll
        for (int n = 0; n < WARP_OUTS / 8; n++) {
            const int token = first_token + warp_token + m * 16 + lane_id() / 4;
            const int out = first_out + warp_out + n * 8 + lane_id() % 4 * 2;
            store_products(a, token, out, sums[m][n][0], sums[m][n][1]);
            store_products(a, token + 8, out, sums[m][n][2], sums[m][n][3]);
        }
    }
}

#define PREFILL_GEMM(NAME, T, TOKENS, OUTS, WARPS_X, WARPS_W, STAGES, TRANSPOSED, ALIGNED)                  \
    extern "C" __global__ __launch_bounds__(WARPS_X* WARPS_W* WARP) void prefill_gemm_##NAME(               \
        const __grid_constant__ PrefillGemmArgs a                                                           \
    ) {                                                                                                     \
        prefill_gemm<T, TOKENS, OUTS, WARPS_X, WARPS_W, STAGES, TRANSPOSED, ALIGNED>(a);                    \
    }

// Sizes as gemm.rs knows them.
#define PREFILL_GEMMS(TYPE, T)                                               \
    PREFILL_GEMM(TYPE##_large, T, 128, 128, 2, 4, 4, false, true)            \
    PREFILL_GEMM(TYPE##_large_t, T, 128, 128, 2, 4, 4, true, true)           \
    PREFILL_GEMM(TYPE##_medium, T, 64, 64, 2, 2, 5, false, true)             \
    PREFILL_GEMM(TYPE##_medium_t, T, 64, 64, 2, 2, 5, true, true)            \
    PREFILL_GEMM(TYPE##_small, T, 32, 32, 2, 2, 8, false, true)              \
    PREFILL_GEMM(TYPE##_small_t, T, 32, 32, 2, 2, 8, true, true)             \
    PREFILL_GEMM(TYPE##_any, T, 64, 64, 2, 2, 2, false, false)               \
    PREFILL_GEMM(TYPE##_any_t, T, 64, 64, 2, 2, 2, true, false)

PREFILL_GEMMS(f16, __half)
PREFILL_GEMMS(bf16, __nv_bfloat16)

// f32, without tensor cores: their f32 keeps 11 bits.
//
// Block      256 threads over a tile of 64 x 64, 16 columns at a time; each thread four tokens by four outputs
constexpr int PLAIN_TILE = 64;
constexpr int PLAIN_DEPTH = 16;

template <bool TRANSPOSED>
__device__ __forceinline__ void prefill_gemm_plain(const PrefillGemmArgs& a) {
    __shared__ float xs[PLAIN_DEPTH][PLAIN_TILE + 1];
    __shared__ float ws[PLAIN_DEPTH][PLAIN_TILE + 1];
    const int first_token = blockIdx.x * PLAIN_TILE;
    const int first_out = blockIdx.y * PLAIN_TILE;
    const int out = threadIdx.x % 16;
    const int token = threadIdx.x / 16;
    const float* x = static_cast<const float*>(a.x);
    const float* w = static_cast<const float*>(a.w);
    float sums[4][4] = {};
    wait_for_previous();
    for (int begin = 0; begin < a.n_in; begin += PLAIN_DEPTH) {
        for (int i = threadIdx.x; i < PLAIN_TILE * PLAIN_DEPTH; i += blockDim.x) {
            const int line = i / PLAIN_DEPTH;
            const int in = i % PLAIN_DEPTH;
            const bool is_in = begin + in < a.n_in;
            const int64_t x_at = static_cast<int64_t>(first_token + line) * a.n_in + begin + in;
            xs[in][line] = is_in && first_token + line < a.n_tokens ? x[x_at] : 0.0f;
            if constexpr (TRANSPOSED) {
                const int col = i % PLAIN_TILE;
                const int row = i / PLAIN_TILE;
                const int64_t w_at = static_cast<int64_t>(begin + row) * a.n_out + first_out + col;
                ws[row][col] = begin + row < a.n_in && first_out + col < a.n_out ? w[w_at] : 0.0f;
            } else {
                const int64_t w_at = static_cast<int64_t>(first_out + line) * a.n_in + begin + in;
                ws[in][line] = is_in && first_out + line < a.n_out ? w[w_at] : 0.0f;
            }
        }
        __syncthreads();
#pragma unroll
        for (int in = 0; in < PLAIN_DEPTH; in++) {
            float outs[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                outs[n] = ws[in][out + 16 * n];
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const float v = xs[in][token + 16 * m];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    sums[m][n] = fmaf(v, outs[n], sums[m][n]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            store_product(a, first_token + token + 16 * m, first_out + out + 16 * n, sums[m][n]);
        }
    }
}

extern "C" __global__ __launch_bounds__(256) void prefill_gemm_f32(const __grid_constant__ PrefillGemmArgs a) {
    prefill_gemm_plain<false>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_gemm_f32_t(const __grid_constant__ PrefillGemmArgs a) {
    prefill_gemm_plain<true>(a);
}
