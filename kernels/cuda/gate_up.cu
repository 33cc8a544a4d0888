// gate_up: gate and up projections of one token, predicted-zero rows left out.
//
// Computes   n = rmsnorm(x);  skip(i) = n_neg(i) > limit(i), n_neg(i) = popcount(signs[i] ^ sign(n)),
//            or, with n_planes, skip(i) = score(i) < limit(i) * scale as in scores.cuh, or as a mask says;
//            h[i] = skip(i) ? 0 : act(w_gate[i] . n) * (w_up[i] . n)
// Source     SparseInfer, arXiv 2411.12692, section 3
// Reference  reference::gate_up; skip equal bit for bit, h within TOLERANCE (sum order)
// Shapes     x, norm (n_cols,) f32; w_gate, w_up (n_rows, n_cols) row-major; signs (n_rows, n_words) u32;
//            low (n_planes - 1, n_rows, n_words) u32; limits (n_rows,) u32 or null for one limit, f32 for
//            scores; h (n_rows,) f32; counts (2,) u64: rows kept, rows active; for audits, or null: normed (n_cols,) f32,
//            skip (n_rows,) u8
// Needs      any n_cols (16-byte loads where rows are multiples of 16 bytes); checked in cuda::launch
// Grid       about one block for each SM; a block takes a contiguous run of rows from the predictor to h, so nothing
//            between the two leaves the SM
// Block      512 threads; shared memory: n by slot, its sign words or planes, a queue of kept and of active rows,
//            one float for each segment of its rows
// Warp       predictor: one row of sign words, or SCORE_ROWS rows of all planes; products: one segment of one queued
//            row at a time
// Bytes      ALL: 2 n_rows * n_cols * sizeof(T). ACTIVE: n_rows + n_active rows. PREDICTED: n_rows * n_words * 4 for
//            each plane, and n_kept + n_active rows. An up row is read only where the gate's activation is not zero
// Order      rows enter a queue in the order warps find them, which moves work between warps, never a sum: each h[i] is
//            one fixed sequence of additions. Integer atomics alone: repeatable bit for bit

#include "dot.cuh"
#include "scores.cuh"

struct GateUpArgs {
    RowCut cut;
    const void* w_gate;
    const void* w_up;
    const float* x;
    const float* norm;
    const uint32_t* signs;
    const uint32_t* low;
    const uint32_t* limits;
    const uint8_t* mask;  // (n_rows,), 1 where a row is left out, in place of a prediction; null for none
    float* h;
    unsigned long long* counts;
    int32_t n_rows;
    int32_t n_words;
    uint32_t limit;
    uint32_t rows;
    uint32_t n_planes;  // 0 where signs alone predict
    uint32_t activation;
    float threshold;
    float eps;
    int32_t n_rows_max;  // most rows of a block: sizes the shared arrays
    float* normed;       // n; null for none
    uint8_t* skip;       // 1 where the predictor left a row out; null for none
};

// Sign disagreements of one row with the signs of the input, on every lane.
__device__ __forceinline__ uint32_t n_neg(const uint32_t* row, const uint32_t* signs, int n_words) {
    uint32_t count = 0;
    if (n_words % 4 == 0) {
        for (int word = 4 * lane_id(); word < n_words; word += 4 * WARP) {
            count += n_differ(load_weights(row + word), *reinterpret_cast<const uint4*>(signs + word));
        }
    } else {
        for (int word = lane_id(); word < n_words; word += WARP) {
            count += __popc(row[word] ^ signs[word]);
        }
    }
    return __reduce_add_sync(0xffffffffu, count);
}

// put(col, x[col]) for columns 0..n_padded, a multiple of WARP, by the threads of a block, whole warps at a time; x is
// (n_cols,) and 0 past that.
template <typename Put>
__device__ __forceinline__ void for_columns(const float* x, int n_cols, int n_padded, const Put& put) {
    // Columns that a thread has on their way at once.
    constexpr int COLS = 8;
    for (int first = threadIdx.x; first < n_padded; first += COLS * blockDim.x) {
        float of[COLS];
#pragma unroll
        for (int i = 0; i < COLS; i++) {
            const int col = first + i * blockDim.x;
            of[i] = col < n_cols ? __ldcg(x + col) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < COLS; i++) {
            const int col = first + i * blockDim.x;
            if (col < n_padded) {
                put(col, of[i]);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void gate_up(const GateUpArgs& a) {
    extern __shared__ float4 shared[];
    __shared__ float scratch[WARP];
    __shared__ int n_kept;
    __shared__ int n_active;
    float* slots = reinterpret_cast<float*>(shared);
    uint32_t* signs = reinterpret_cast<uint32_t*>(slots + n_slots<T>(a.cut));
    float* h = reinterpret_cast<float*>(signs + (a.n_planes > 0 ? x_planes_words(a.n_words) : n_slots<T>(a.cut) / WARP));
    int* kept = reinterpret_cast<int*>(h + a.n_rows_max);
    int* active = kept + a.n_rows_max;
    float* partials = reinterpret_cast<float*>(active + a.n_rows_max);

    const int begin = share_begin(a.n_rows, blockIdx.x, gridDim.x);
    const int n_rows = share_begin(a.n_rows, blockIdx.x + 1, gridDim.x) - begin;
    const T* w_gate = static_cast<const T*>(a.w_gate) + static_cast<int64_t>(begin) * a.cut.n_cols;
    const T* w_up = static_cast<const T*>(a.w_up) + static_cast<int64_t>(begin) * a.cut.n_cols;
    const uint32_t* row_signs = a.signs + static_cast<int64_t>(begin) * a.n_words;

    const BitRows bits = {a.signs, a.low, static_cast<int>(a.n_planes), a.n_rows, a.n_words};

    const auto gate_row = [&](int i) { return w_gate + static_cast<int64_t>(i) * a.cut.n_cols; };
    // Gate and up rows in turn, for the dense pass.
    const auto both_rows = [&](int i) {
        return (i & 1 ? w_up : w_gate) + static_cast<int64_t>(i / 2) * a.cut.n_cols;
    };

    prefetch_norm(a.norm, a.cut.n_cols);
    if (a.rows == ALL) {
        prefetch_first_items<T>(a.cut, 2 * n_rows, both_rows);
    } else if (a.rows == ACTIVE) {
        prefetch_first_items<T>(a.cut, n_rows, gate_row);
    } else if (a.mask == nullptr) {
        bits.prefetch(begin, begin + n_rows);
    }
    wait_for_previous();

    load_normalised<T>(a.cut, a.x, a.norm, a.eps, slots, signs, scratch);
    if (threadIdx.x == 0) {
        n_kept = a.rows == PREDICTED ? 0 : n_rows;
        n_active = 0;
    }
    if (a.skip != nullptr) {
        for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
            a.skip[begin + i] = a.rows == PREDICTED;
        }
    }
    __syncthreads();
    if (a.normed != nullptr && blockIdx.x == 0) {
        for (int col = threadIdx.x; col < a.cut.n_cols; col += blockDim.x) {
            a.normed[col] = slots[slot<T>(col, n_slots<T>(a.cut) / 2)];
        }
    }

    if (a.rows == ALL) {
        dot_items<T>(a.cut, 2 * n_rows, slots, partials, both_rows);
        __syncthreads();
        int n = 0;
        for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
            const float gate = activate(a.activation, a.threshold, row_total(a.cut, partials, 2 * i));
            a.h[begin + i] = gate * row_total(a.cut, partials, 2 * i + 1);
            n += gate != 0.0f;
        }
        atomicAdd(&n_active, n);
    } else {
        if (a.rows == PREDICTED && a.mask != nullptr) {
            for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
                if (a.mask[begin + i] == 0) {
                    kept[atomicAdd(&n_kept, 1)] = i;
                }
            }
        } else if (a.rows == PREDICTED && a.n_planes > 0) {
            const int n_columns = n_slots<T>(a.cut);
            uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
            const float scale = quantise(a.n_words, signs, words, [&](int col) {
                return col < n_columns ? *reinterpret_cast<const float4*>(slots + slot<T>(col, n_columns / 2))
                                       : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            });
            __syncthreads();
            bits.scores(begin, begin + n_rows, signs, [&](int row, int32_t score) {
                if (is_kept(score, limit_of(a.limits, a.limit, row), scale)) {
                    kept[atomicAdd(&n_kept, 1)] = row - begin;
                }
            });
        } else if (a.rows == PREDICTED) {
#pragma unroll 4
            for (int i = warp_id(); i < n_rows; i += blockDim.x / WARP) {
                const uint32_t limit = limit_of(a.limits, a.limit, begin + i);
                const bool keep = n_neg(row_signs + i * a.n_words, signs, a.n_words) <= limit;
                if (lane_id() == 0 && keep) {
                    kept[atomicAdd(&n_kept, 1)] = i;
                }
            }
        } else {
            for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
                kept[i] = i;
            }
        }
        for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
            h[i] = 0.0f;
        }
        __syncthreads();

        dot_items<T>(a.cut, n_kept, slots, partials, [&](int i) { return gate_row(kept[i]); });
        __syncthreads();
        for (int i = threadIdx.x; i < n_kept; i += blockDim.x) {
            const float gate = activate(a.activation, a.threshold, row_total(a.cut, partials, i));
            if (gate != 0.0f) {
                h[kept[i]] = gate;
                active[atomicAdd(&n_active, 1)] = kept[i];
            }
            if (a.skip != nullptr) {
                a.skip[begin + kept[i]] = 0;
            }
        }
        __syncthreads();

        dot_items<T>(a.cut, n_active, slots, partials, [&](int i) {
            return w_up + static_cast<int64_t>(active[i]) * a.cut.n_cols;
        });
        __syncthreads();
        for (int i = threadIdx.x; i < n_active; i += blockDim.x) {
            h[active[i]] *= row_total(a.cut, partials, i);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
            a.h[begin + i] = h[i];
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(a.counts, static_cast<unsigned long long>(n_kept));
        atomicAdd(a.counts + 1, static_cast<unsigned long long>(n_active));
    }
}

extern "C" __global__ __launch_bounds__(512, 2) void gate_up_f32(const __grid_constant__ GateUpArgs a) {
    gate_up<float>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void gate_up_f16(const __grid_constant__ GateUpArgs a) {
    gate_up<__half>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void gate_up_bf16(const __grid_constant__ GateUpArgs a) {
    gate_up<__nv_bfloat16>(a);
}

// predict: the predictor alone, for measurements and tests; skip (n_rows,) u8.
struct PredictArgs {
    const float* x;
    const uint32_t* signs;
    const uint32_t* limits;
    uint8_t* skip;
    int32_t n_rows;
    int32_t n_cols;
    uint32_t limit;
};

// Rows that a warp counts side by side: all of its rows at the 7B shape on an H100.
constexpr int PREDICT_ROWS = 6;

extern "C" __global__ __launch_bounds__(512, 2) void predict(const __grid_constant__ PredictArgs a) {
    extern __shared__ uint4 shared_words[];
    uint32_t* signs = reinterpret_cast<uint32_t*>(shared_words);
    const int n_words = (a.n_cols + WARP - 1) / WARP;
    const BitRows bits = {a.signs, nullptr, 1, a.n_rows, n_words};
    const int begin = share_begin(a.n_rows, blockIdx.x, gridDim.x);
    const int end = share_begin(a.n_rows, blockIdx.x + 1, gridDim.x);
    bits.prefetch(begin, end);
    wait_for_previous();
    for_columns(a.x, a.n_cols, n_words * WARP, [&](int col, float x) {
        const uint32_t word = __ballot_sync(0xffffffffu, x < 0.0f);
        if (lane_id() == 0) {
            signs[col / WARP] = word;
        }
    });
    __syncthreads();
    const int n_warps = blockDim.x / WARP;
    const auto put = [&](int row, uint32_t differ) {
        if (lane_id() == 0) {
            a.skip[row] = differ > limit_of(a.limits, a.limit, row);
        }
    };
    if (n_words % 4 != 0) {
        for (int row = begin + warp_id(); row < end; row += n_warps) {
            put(row, n_neg(bits.row(0, row), signs, n_words));
        }
        return;
    }
    for (int first = begin + warp_id(); first < end; first += PREDICT_ROWS * n_warps) {
        uint32_t differ[PREDICT_ROWS] = {};
        for (int word = 4 * lane_id(); word < n_words; word += 4 * WARP) {
            uint4 words[PREDICT_ROWS];
#pragma unroll
            for (int i = 0; i < PREDICT_ROWS; i++) {
                words[i] = load_weights(bits.row(0, min(first + i * n_warps, end - 1)) + word);
            }
            const uint4 x = *reinterpret_cast<const uint4*>(signs + word);
#pragma unroll
            for (int i = 0; i < PREDICT_ROWS; i++) {
                differ[i] += n_differ(words[i], x);
            }
        }
#pragma unroll
        for (int i = 0; i < PREDICT_ROWS; i++) {
            const uint32_t of_row = __reduce_add_sync(0xffffffffu, differ[i]);
            if (first + i * n_warps < end) {
                put(first + i * n_warps, of_row);
            }
        }
    }
}

// predict_scores: the predictor of scores alone, for measurements and tests; scores (n_rows,) i32, scale (1,) f32,
// skip (n_rows,) u8.
struct PredictScoresArgs {
    const float* x;
    const uint32_t* signs;
    const uint32_t* low;
    const uint32_t* limits;
    int32_t* scores;
    float* scale;
    uint8_t* skip;
    int32_t n_rows;
    int32_t n_cols;
    uint32_t limit;
    uint32_t n_planes;
};

extern "C" __global__ __launch_bounds__(512, 2) void predict_scores(const __grid_constant__ PredictScoresArgs a) {
    extern __shared__ uint4 shared_words[];
    __shared__ uint32_t scratch[WARP];
    const int n_words = (a.n_cols + WARP - 1) / WARP;
    uint32_t* planes = reinterpret_cast<uint32_t*>(shared_words);
    float* x = reinterpret_cast<float*>(planes + x_planes_words(n_words));
    const BitRows bits = {a.signs, a.low, static_cast<int>(a.n_planes), a.n_rows, n_words};
    const int begin = share_begin(a.n_rows, blockIdx.x, gridDim.x);
    const int end = share_begin(a.n_rows, blockIdx.x + 1, gridDim.x);
    bits.prefetch(begin, end);
    wait_for_previous();
    for_columns(a.x, a.n_cols, x_planes_words(n_words) * 4, [&](int col, float of) { x[col] = of; });
    __syncthreads();
    const float scale =
        quantise(n_words, planes, scratch, [&](int col) { return *reinterpret_cast<const float4*>(x + col); });
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *a.scale = scale;
    }
    bits.scores(begin, end, planes, [&](int row, int32_t score) {
        a.scores[row] = score;
        a.skip[row] = !is_kept(score, limit_of(a.limits, a.limit, row), scale);
    });
}
