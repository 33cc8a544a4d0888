// predict_low_rank: the rows that one token leaves out by a score of low rank, both factors in one kernel.
//
// Computes   skip[row] = score(row) < limit(row), as in low_rank.cuh
// Source     data and the flag that it is there in one word: the LL protocol of NCCL
// Reference  reference::predict_low_rank; equal bit for bit
// Shapes     x (n_cols,) f32; planes (x_planes_words,) u32 and x_scale (1,) f32, for a residual; fc1, fc2, signs and scales
//            as in low_rank.cuh; limits (n_rows,) f32, or null for the one limit; skip (n_rows,) u8; inner (rank,) u64, an f32
//            below and the turn above; turns (gridDim.x,) u32, launches so far
// Needs      rank a multiple of 8, words of a row of signs of 4; the same inner, turns and grid in every launch
// Grid       one block for each SM, launched cooperatively: each multiplies its rows of fc1, waits for the products of all
//            others, and scores its rows of fc2
// Block      512 threads and a scout warp; shared memory: inner, as much for the scout, and the sums of segments of the
//            block's rows of fc1
// Warp       a segment of fc1's rows; SCORE_ROWS rows of fc2 and of signs
// Loads      L2 is asked for the rows of fc2 once x is there, which comes late behind them. They move on to registers once
//            the block's products are out, whose sums would wait behind them. Instructions come late as well, about 100 clocks
//            for eight of them: while the others wait for x, the scout goes through those of the scores, on what is at hand
// Bytes      rank * (n_cols + n_rows) * 2, and n_rows * n_words * 4 with a residual
// Order      that of low_rank.cuh
// Measured   H100 80GB, sm_90a, 7B shape, rank 256, launched to overlap: 5.20 us for 7.73 MB that a plain read brings in 3.89;
//            with the signs of a residual 8.74 for 13.4 MB in 5.53; as the two kernels of a batch 7.64; records/
// Tried      rows of fc2 by bulk copies or cp.async to shared memory: 1 to 2 us slower. All rows asked for at once: x comes
//            0.6 us later. Rows of fc2 on to registers before the products are out: 1 us slower, as sums in shared memory wait
//            behind loads. One chain of sums for all columns: 0.5 us. No scout: 0.7 us

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
    int32_t block_rows;   // rows of fc2 of a block; of the last ones fewer
    int32_t block_inner;  // of fc1, likewise
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
constexpr int L2_LINE = 128;
// A barrier of all warps but the scout.
struct Predicting {
    __device__ __forceinline__ static void sync() { asm volatile("bar.sync 1, %0;" ::"n"(PREDICT_WARPS * WARP) : "memory"); }
};

// Asks L2 for n_bytes, a line for each thread in turn.
__device__ __forceinline__ void ask_lines(const void* from, int n_bytes) {
    const char* begin = static_cast<const char*>(from);
    const int past_line = static_cast<int>(reinterpret_cast<uintptr_t>(from) % L2_LINE);
    for (int at = L2_LINE * threadIdx.x - past_line; at < n_bytes; at += L2_LINE * PREDICT_WARPS * WARP) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(begin + max(at, 0)));
    }
}

extern "C" __global__ __launch_bounds__((PREDICT_WARPS + 1) * WARP) void predict_low_rank(
    const __grid_constant__ PredictLowRankArgs a
) {
    extern __shared__ float4 shared_floats[];
    __shared__ uint32_t turn;
    LowRank w = a.factors;
    BitRows residual = {a.signs, nullptr, 1, a.n_rows, (a.n_cols + WARP - 1) / WARP};
    __builtin_assume(w.rank % LANE_CHAINS == 0);
    __builtin_assume(residual.n_words % 4 == 0);
    const bool has_residual = w.scales != nullptr;
    const int n_segs = n_segments(a.n_cols);
    float* inner = reinterpret_cast<float*>(shared_floats);
    float* of_scout = inner + w.rank;
    float* sums = of_scout + w.rank;
    const int first_inner = blockIdx.x * a.block_inner;
    const int n_inner = min(a.block_inner, w.rank - first_inner);
    int begin = blockIdx.x * a.block_rows;
    int n_rows = min(a.block_rows, a.n_rows - begin);
    const __half* fc1 = w.fc1 + static_cast<int64_t>(first_inner) * a.n_cols;

    const bool is_scout = warp_id() == PREDICT_WARPS;
    if (!is_scout && n_rows > 0) {
        if (has_residual) {
            if (threadIdx.x == WARP) {
                prefetch_l2(residual.row(0, begin), n_rows * residual.n_words * sizeof(uint32_t));
            }
            ask_lines(w.scales + begin, n_rows * static_cast<int>(sizeof(float)));
        }
        if (a.limits != nullptr) {
            ask_lines(a.limits + begin, n_rows * static_cast<int>(sizeof(uint32_t)));
        }
    }
    if (threadIdx.x == 0 && n_inner > 0 && a.n_cols % PER_LOAD<__half> == 0) {
        prefetch_l2(fc1, n_inner * a.n_cols * sizeof(__half));
    }
    wait_for_writes();
    if (is_scout) {
        // Any memory will do that is at least as long as a row.
        w.fc2 = reinterpret_cast<const __half*>(a.x);
        w.scales = has_residual ? a.x : nullptr;
        residual.signs = reinterpret_cast<const uint32_t*>(a.x);
        begin = 0;
        n_rows = 1;
    } else {
        if (threadIdx.x == 0) {
            turn = __ldcg(a.turns + blockIdx.x) + 1;
            a.turns[blockIdx.x] = turn;
        }
        for (int segment = warp_id(); segment < n_segs; segment += PREDICT_WARPS) {
            float x[SEGMENT_TERMS];
#pragma unroll
            for (int i = 0; i < SEGMENT_TERMS; i++) {
                const int col = segment * DOT_SEGMENT + i * DOT_CHAINS + lane_id();
                x[i] = col < a.n_cols ? __ldcg(a.x + col) : 0.0f;
            }
#pragma unroll 2
            for (int k = 0; k < n_inner; k++) {
                const __half* row = fc1 + k * a.n_cols;
                sums[(k * n_segs + segment) * DOT_CHAINS + lane_id()] =
                    segment_sum(segment, a.n_cols, [&](int i, int col) {
                        return __fmul_rn(__half2float(__ldg(row + col)), x[i]);
                    });
            }
        }
        if (n_rows > 0) {
            ask_lines(w.fc2 + static_cast<int64_t>(begin) * w.rank, n_rows * w.rank * static_cast<int>(sizeof(__half)));
        }
        Predicting::sync();
        for (int k = warp_id(); k < n_inner; k += PREDICT_WARPS) {
            const float dot = add_segments(sums + k * n_segs * DOT_CHAINS, n_segs);
            if (lane_id() == 0) {
                publish(a.inner + first_inner + k, inner_of(dot, w.relu), turn);
            }
        }
        Predicting::sync();
        let_next_start();
    }

    bool has_inner = is_scout;
#pragma unroll 1
    for (int first = is_scout ? 0 : warp_id() * SCORE_ROWS; first < n_rows || !has_inner;
         first += PREDICT_WARPS * SCORE_ROWS) {
        // Past the last row the last one stands in.
        const int row = begin + max(0, min(first + lane_id() / 4, n_rows - 1));
        uint4 weights[SEGMENT_TERMS];
        float added = 0.0f;
        if (first < n_rows) {
            if (has_residual) {
                const float scale = __ldg(w.scales + row);
                added = residual_score(residual.score(row, a.planes), __ldcg(a.x_scale), scale);
            }
            RowDot::load(w, row, 0, weights);
        }
        if (!has_inner) {
            for (int k = threadIdx.x; k < w.rank; k += PREDICT_WARPS * WARP) {
                inner[k] = wait_for(a.inner + k, turn);
            }
            Predicting::sync();
            has_inner = true;
        }
        if (first >= n_rows) {
            break;
        }
        RowDot dot;
        dot.add(w, 0, weights, is_scout ? of_scout : inner);
#pragma unroll 1
        for (int segment = 1; segment < n_segments(w.rank); segment++) {
            RowDot::load(w, row, segment, weights);
            dot.add(w, segment, weights, inner);
        }
        float score = dot.total();
        if (has_residual) {
            score = __fadd_rn(score, added);
        }
        const bool is_kept = passes(score, limit_of(a.limits, a.limit, row));
        if (!is_scout && lane_id() % 4 == 0 && first + lane_id() / 4 < n_rows) {
            a.skip[row] = !is_kept;
        }
    }
}
