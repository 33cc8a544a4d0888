// predict_low_rank: the rows that one token leaves out by a score of low rank, both factors in one kernel.
//
// Computes   skip[row] = score(row) < limit(row), as in low_rank.cuh
// Source     data and the flag that it is there in one word: the LL protocol of NCCL
// Reference  reference::predict_low_rank; equal bit for bit
// Shapes     x (n_cols,) f32; planes (x_planes_words,) u32 and x_scale (1,) f32, for a residual; fc1, fc2, signs and scales
//            as in low_rank.cuh; limits (n_rows,) f32, or null for the one limit; skip (n_rows,) u8; inner (rank,) u64, an f32
//            below and the turn above; turns (gridDim.x,) u32, launches so far
// Needs      rank a multiple of 8, columns of 512 (whole segments of a dot product, whole steps of words of signs); the same
//            inner, turns and grid in every launch
// Grid       one block for each SM, launched cooperatively: each multiplies its rows of fc1, waits for the products of all
//            others, and scores its rows of fc2
// Block      512 threads; shared memory: inner, sums of segments of the block's rows of fc1, those rows, and of each warp with
//            rows of fc2 its first SCORE_ROWS rows of signs, in the order in which lanes read them
// Warp       a segment of fc1's rows, two at a time; SCORE_ROWS rows of fc2 and of signs
// Loads      what all blocks wait for comes first. Rows of fc1 are copied to shared memory at the start. Signs follow them at
//            once in warps without work on fc1, in others behind x, which comes after all that was asked for before it. L2
//            is asked for rows of fc2 when fc1 is there; they move on to registers once signs are counted, or without signs
//            once the block's products are out, as sums in shared memory wait behind loads
// Bytes      rank * (n_cols + n_rows) * 2, and n_rows * n_words * 4 with a residual
// Order      that of low_rank.cuh
// Measured   H100 80GB, sm_90a, 7B shape, launched to overlap: rank 256 5.20 us for 7.73 MB that a plain read brings in 3.90;
//            rank 88 with the signs of a residual 5.44 for 8.29 MB in 4.03; records/
// Tried      signs from L2 to registers: 1 us slower, as the cache that such loads pass through is what shared memory leaves.
//            Rows of fc2 to shared memory as well: 0.3 us with signs, nothing without. Planes of x too: 0.2 to 0.3 us. Signs
//            before x in all warps: 0.5 us; not before fc1 is there: nothing. One row of fc1 at a time: 0.25 us at rank 256.
//            Rows of fc2 on to registers before the products are out: 0.9 us. Launched without the promise that blocks run
//            together, so that each starts where one of the kernel before ends: 0.5 us less alone, but nothing in a token

#include "low_rank.cuh"

struct PredictLowRankArgs {
    LowRank factors;
    const float* x;
    const uint32_t* planes;
    const float* x_scale;
    const uint32_t* signs;
    const uint32_t* limits;
    unsigned long long* inner;
    uint32_t* turns;
    uint8_t* skip;
    int32_t n_rows;
    int32_t n_cols;
    uint32_t limit;
    int32_t block_rows;    // rows of fc2 of a block; of the last ones fewer
    int32_t block_inner;   // of fc1, likewise; even
    int32_t inner_floats;  // the rank in whole DOT_CHAINS
};

// A product of a turn, for all blocks.
__device__ __forceinline__ void publish(unsigned long long* to, float product, uint32_t turn) {
    const unsigned long long word = static_cast<unsigned long long>(turn) << 32 | __float_as_uint(product);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// The same, once it is there.
__device__ __forceinline__ float wait_for(const unsigned long long* from, uint32_t turn) {
    unsigned long long word;
    do {
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    } while (static_cast<uint32_t>(word >> 32) != turn);
    return __uint_as_float(static_cast<uint32_t>(word));
}

constexpr int PREDICT_WARPS = 16;
// Columns of a row of fc1 that a lane copies at a time.
constexpr int COPY_COLS = DOT_SEGMENT / WARP;
static_assert(COPY_COLS * sizeof(__half) == 16, "what copy_async copies");

template <bool HAS_RESIDUAL>
__device__ __forceinline__ void predict(const PredictLowRankArgs& a) {
    extern __shared__ float4 shared_floats[];
    const LowRank w = a.factors;
    __builtin_assume(w.rank % LANE_CHAINS == 0);
    const int n_segs = a.n_cols / DOT_SEGMENT;
    const int n_words = a.n_cols / WARP;
    const int n_steps = n_words / STEP_WORDS;
    float* inner = reinterpret_cast<float*>(shared_floats);
    float* sums = inner + a.inner_floats;
    __half* fc1 = reinterpret_cast<__half*>(sums + a.block_inner * n_segs * DOT_CHAINS);
    // The lane's own.
    uint4* signs = reinterpret_cast<uint4*>(fc1 + a.block_inner * a.n_cols) + warp_id() * n_steps * WARP + lane_id();
    const int first_inner = blockIdx.x * a.block_inner;
    const int n_inner = min(a.block_inner, w.rank - first_inner);
    const int begin = blockIdx.x * a.block_rows;
    const int n_rows = min(a.block_rows, a.n_rows - begin);

    // The lane's row of those from first on; past the last one that stands in.
    const auto row_from = [&](int first) { return begin + min(first + lane_id() / 4, n_rows - 1); };
    const auto copy_signs = [&](int row) {
        const uint32_t* from = a.signs + static_cast<int64_t>(row) * n_words + lane_id() % 4 * 4;
#pragma unroll 8
        for (int step = 0; step < n_steps; step++) {
            copy_async(signs + step * WARP, from + step * STEP_WORDS, true);
        }
        commit_copies();
    };
    const int first_row = warp_id() * SCORE_ROWS;
    const bool has_signs = HAS_RESIDUAL && first_row < n_rows;
    const bool has_x = n_inner > 0 && warp_id() < n_segs;
    bool is_copied = !has_signs;
#pragma unroll 1
    for (int segment = warp_id(); segment < n_segs; segment += PREDICT_WARPS) {
        for (int k = 0; k < n_inner; k++) {
            const int at = segment * DOT_SEGMENT + lane_id() * COPY_COLS;
            copy_async(fc1 + k * a.n_cols + at, w.fc1 + static_cast<int64_t>(first_inner + k) * a.n_cols + at, true);
        }
    }
    commit_copies();
    if (!has_x && !is_copied) {
        copy_signs(row_from(first_row));
        is_copied = true;
    }
    wait_for_writes();
    const uint32_t turn = __ldcg(a.turns + blockIdx.x) + 1;
#pragma unroll 1
    for (int segment = warp_id(); segment < n_segs; segment += PREDICT_WARPS) {
        const int col = segment * DOT_SEGMENT + lane_id();
        float x[SEGMENT_TERMS];
#pragma unroll
        for (int i = 0; i < SEGMENT_TERMS; i++) {
            x[i] = __ldcg(a.x + col + i * DOT_CHAINS);
        }
        if (!is_copied) {
            copy_signs(row_from(first_row));
            is_copied = true;
        }
        // All but signs.
        if (has_signs) {
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncwarp();
        // The last row of an odd number twice.
#pragma unroll 1
        for (int k = 0; k < n_inner; k += 2) {
            const int rows[2] = {k, min(k + 1, n_inner - 1)};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < SEGMENT_TERMS; i++) {
                    const float weight = __half2float(fc1[rows[j] * a.n_cols + col + i * DOT_CHAINS]);
                    sum = __fadd_rn(sum, __fmul_rn(weight, x[i]));
                }
                sums[(rows[j] * n_segs + segment) * DOT_CHAINS + lane_id()] = sum;
            }
        }
    }
    if (threadIdx.x == 0 && n_rows > 0) {
        prefetch_l2(w.fc2 + static_cast<int64_t>(begin) * w.rank, n_rows * w.rank * sizeof(__half));
    }
    __syncthreads();
    for (int k = warp_id(); k < n_inner; k += PREDICT_WARPS) {
        const float dot = add_segments(sums + k * n_segs * DOT_CHAINS, n_segs);
        if (lane_id() == 0) {
            publish(a.inner + first_inner + k, inner_of(dot, w.relu), turn);
        }
    }
    if (!HAS_RESIDUAL) {
        __syncthreads();
    }
    let_next_start();

    bool has_inner = false;
#pragma unroll 1
    for (int first = first_row; first < n_rows || !has_inner; first += PREDICT_WARPS * SCORE_ROWS) {
        const int row = row_from(first);
        uint4 weights[SEGMENT_TERMS];
        float added = 0.0f;
        uint32_t limit = 0;
        if (first < n_rows) {
            const float scale = HAS_RESIDUAL ? __ldg(w.scales + row) : 0.0f;
            ScoreCounts counts;
            if (HAS_RESIDUAL) {
                if (has_inner) {
                    copy_signs(row);
                }
                wait_copies<0>();
                counts.add_plane<8, true>(n_words, a.planes, [&](int word) { return signs[word / STEP_WORDS * WARP]; });
            }
            // While the last of the counts come out.
            RowDot::load(w, row, 0, weights);
            limit = limit_of(a.limits, a.limit, row);
            if (HAS_RESIDUAL) {
                added = residual_score(counts.score(), __ldcg(a.x_scale), scale);
            }
        }
        if (!has_inner) {
            // From the last thread on: the last warps have no rows, as a rule, and so the time.
            for (int k = PREDICT_WARPS * WARP - 1 - threadIdx.x; k < a.inner_floats; k += PREDICT_WARPS * WARP) {
                inner[k] = k < w.rank ? wait_for(a.inner + k, turn) : 0.0f;
            }
            __syncthreads();
            has_inner = true;
            // Every thread that needs it has read it.
            if (threadIdx.x == 0) {
                a.turns[blockIdx.x] = turn;
            }
        }
        if (first >= n_rows) {
            break;
        }
        RowDot dot;
        dot.add<true>(w, 0, weights, inner);
#pragma unroll 1
        for (int segment = 1; segment < n_segments(w.rank); segment++) {
            RowDot::load(w, row, segment, weights);
            dot.add<true>(w, segment, weights, inner);
        }
        float score = dot.total();
        if (HAS_RESIDUAL) {
            score = __fadd_rn(score, added);
        }
        const bool is_kept = passes(score, limit);
        if (lane_id() % 4 == 0 && first + lane_id() / 4 < n_rows) {
            a.skip[row] = !is_kept;
        }
    }
}

extern "C" __global__ __launch_bounds__(PREDICT_WARPS * WARP) void predict_low_rank(
    const __grid_constant__ PredictLowRankArgs a
) {
    predict<false>(a);
}

// The same, of factors with a residual.
extern "C" __global__ __launch_bounds__(PREDICT_WARPS * WARP) void predict_low_rank_sign(
    const __grid_constant__ PredictLowRankArgs a
) {
    predict<true>(a);
}
