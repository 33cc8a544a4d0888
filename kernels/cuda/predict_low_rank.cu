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
// Block      512 threads and a scout warp; shared memory: inner, as much for the scout, and the sums of segments of the
//            block's rows of fc1
// Warp       a segment of fc1's rows, two at a time; SCORE_ROWS rows of fc2 and of signs
// Loads      the scout asks L2 for rows, in the order in which all blocks need them: fc1 at the start, of which the slowest
//            block's is waited for; signs at once in blocks without rows of fc1, in others when those are there; then fc2.
//            Without signs, fc2 once x and fc1 are there, which come late behind it. Rows move on to registers once the
//            block's products are out, whose sums would wait behind them
// Code       instructions are cold at each start, about 100 clocks for eight of them, so that less of them is faster than
//            fewer loads: no case for columns past a last one, none for one row alone. While the others wait for x, the
//            scout goes through the code that comes after, on what is at hand
// Bytes      rank * (n_cols + n_rows) * 2, and n_rows * n_words * 4 with a residual
// Order      that of low_rank.cuh
// Measured   H100 80GB, sm_90a, 7B shape, launched to overlap: rank 256 5.24 us for 7.73 MB that a plain read brings in 3.93;
//            rank 88 with the signs of a residual 6.16 for 8.29 MB in 4.03; records/
// Tried      rows of fc2 by bulk copies or cp.async to shared memory: 1 to 2 us slower. All rows asked for at once: x comes
//            0.6 us later. Rows of fc2 on to registers before the products are out: 1 us slower, as sums in shared memory wait
//            behind loads; before those of signs: 2 us, as loads come in order. Rows of fc1 before x: 0.3 us. Signs on warps
//            of their own: 0.3 to 0.7 us. Two blocks on an SM by fewer registers: 0.9 to 1.8 us. One chain of sums for all
//            columns: 0.5 us. No scout: 0.7 us

#include "low_rank.cuh"

// Sums of segments that the scout adds.
constexpr int SCOUT_SEGMENTS = 4;

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
    int32_t inner_floats;  // the rank in whole SCOUT_SEGMENTS * DOT_CHAINS
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

// Asks L2 for what holds n_bytes, in whole 16 bytes.
__device__ __forceinline__ void prefetch_around(const void* from, int n_bytes) {
    const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16);
    prefetch_l2(static_cast<const char*>(from) - before, (before + n_bytes + 15) / 16 * 16);
}

constexpr int PREDICT_WARPS = 16;
// A barrier of all warps but the scout.
struct Predicting {
    __device__ __forceinline__ static void sync() { asm volatile("bar.sync 1, %0;" ::"n"(PREDICT_WARPS * WARP) : "memory"); }
};

template <bool HAS_RESIDUAL>
__device__ __forceinline__ void predict(const PredictLowRankArgs& a) {
    extern __shared__ float4 shared_floats[];
    LowRank w = a.factors;
    __builtin_assume(w.rank % LANE_CHAINS == 0);
    const int n_segs = a.n_cols / DOT_SEGMENT;
    const int n_words = a.n_cols / WARP;
    float* inner = reinterpret_cast<float*>(shared_floats);
    float* of_scout = inner + a.inner_floats;
    float* sums = of_scout + a.inner_floats;
    const int first_inner = blockIdx.x * a.block_inner;
    const int n_inner = min(a.block_inner, w.rank - first_inner);
    int begin = blockIdx.x * a.block_rows;
    int n_rows = min(a.block_rows, a.n_rows - begin);
    const __half* fc1 = w.fc1 + static_cast<int64_t>(first_inner) * a.n_cols;
    const __half* fc2 = w.fc2 + static_cast<int64_t>(begin) * w.rank;
    const uint32_t* signs = a.signs;
    uint32_t turn = 0;

    const bool is_scout = warp_id() == PREDICT_WARPS;
    const bool asks = is_scout && lane_id() == 0;
    const auto ask_signs = [&] {
        prefetch_l2(signs + static_cast<int64_t>(begin) * n_words, n_rows * n_words * sizeof(uint32_t));
    };
    if (asks && n_inner > 0) {
        prefetch_l2(fc1, n_inner * a.n_cols * sizeof(__half));
    }
    if (asks && n_rows > 0) {
        if (HAS_RESIDUAL) {
            if (n_inner <= 0) {
                ask_signs();
            }
            prefetch_around(w.scales + begin, n_rows * sizeof(float));
        }
        if (a.limits != nullptr) {
            prefetch_around(a.limits + begin, n_rows * sizeof(uint32_t));
        }
    }
    wait_for_writes();
    if (!is_scout) {
        turn = __ldcg(a.turns + blockIdx.x) + 1;
#pragma unroll 1
        for (int segment = warp_id(); segment < n_segs; segment += PREDICT_WARPS) {
            const int col = segment * DOT_SEGMENT + lane_id();
            float x[SEGMENT_TERMS];
#pragma unroll
            for (int i = 0; i < SEGMENT_TERMS; i++) {
                x[i] = __ldcg(a.x + col + i * DOT_CHAINS);
            }
            // The last row of an odd number twice.
#pragma unroll 1
            for (int k = 0; k < n_inner; k += 2) {
                const int rows[2] = {k, min(k + 1, n_inner - 1)};
                __half terms[2][SEGMENT_TERMS];
#pragma unroll
                for (int j = 0; j < 2; j++) {
#pragma unroll
                    for (int i = 0; i < SEGMENT_TERMS; i++) {
                        terms[j][i] = __ldg(fc1 + rows[j] * a.n_cols + col + i * DOT_CHAINS);
                    }
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < SEGMENT_TERMS; i++) {
                        sum = __fadd_rn(sum, __fmul_rn(__half2float(terms[j][i]), x[i]));
                    }
                    sums[(rows[j] * n_segs + segment) * DOT_CHAINS + lane_id()] = sum;
                }
            }
        }
        if (!HAS_RESIDUAL && threadIdx.x == 0 && n_rows > 0) {
            prefetch_l2(fc2, n_rows * w.rank * sizeof(__half));
        }
        Predicting::sync();
    }
#pragma unroll 1
    for (int k = is_scout ? 0 : warp_id(); k < n_inner; k += is_scout ? n_inner : PREDICT_WARPS) {
        const float dot = is_scout ? add_segments(of_scout, SCOUT_SEGMENTS)
                                   : add_segments(sums + k * n_segs * DOT_CHAINS, n_segs);
        if (!is_scout && lane_id() == 0) {
            publish(a.inner + first_inner + k, inner_of(dot, w.relu), turn);
        }
    }
    if (is_scout) {
        if (HAS_RESIDUAL && asks && n_rows > 0) {
            if (n_inner > 0) {
                ask_signs();
            }
            prefetch_l2(fc2, n_rows * w.rank * sizeof(__half));
        }
        // Any memory will do that is at least as long as a row.
        w.fc2 = reinterpret_cast<const __half*>(a.x);
        w.scales = a.x;
        signs = reinterpret_cast<const uint32_t*>(a.x);
        begin = 0;
        n_rows = 1;
    } else {
        if (!HAS_RESIDUAL) {
            Predicting::sync();
        }
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
        uint32_t limit = 0;
        if (first < n_rows) {
            const float scale = HAS_RESIDUAL ? __ldg(w.scales + row) : 0.0f;
            ScoreCounts counts;
            if (HAS_RESIDUAL) {
                const uint32_t* words = signs + static_cast<int64_t>(row) * n_words;
                counts.add_plane<8, true>(n_words, a.planes, [&](int word) { return load_weights(words + word); });
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
            Predicting::sync();
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
        dot.add<true>(w, 0, weights, is_scout ? of_scout : inner);
#pragma unroll 1
        for (int segment = 1; segment < n_segments(w.rank); segment++) {
            RowDot::load(w, row, segment, weights);
            dot.add<true>(w, segment, weights, is_scout ? of_scout : inner);
        }
        float score = dot.total();
        if (HAS_RESIDUAL) {
            score = __fadd_rn(score, added);
        }
        const bool is_kept = passes(score, limit);
        if (!is_scout && lane_id() % 4 == 0 && first + lane_id() / 4 < n_rows) {
            a.skip[row] = !is_kept;
        }
    }
}

extern "C" __global__ __launch_bounds__((PREDICT_WARPS + 1) * WARP) void predict_low_rank(
    const __grid_constant__ PredictLowRankArgs a
) {
    predict<false>(a);
}

// The same, of factors with a residual.
extern "C" __global__ __launch_bounds__((PREDICT_WARPS + 1) * WARP) void predict_low_rank_sign(
    const __grid_constant__ PredictLowRankArgs a
) {
    predict<true>(a);
}
