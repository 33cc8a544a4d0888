// attention: softmax attention of one token over the cache, its own position included, split over positions.
//
// Computes   out[h] = softmax(q[h] . k / sqrt(head_dim)) v over positions 0..=position of head h's key/value head
// Source     Flash-Decoding (Dao et al. 2023): partial softmax for each chunk of positions, merged by their maxima
// Reference  reference::attention; within TOLERANCE (sum order, exp2)
// Shapes     q, out (n_heads, head_dim) f32; k, v (n_kv_heads, n_positions_max, head_dim) f16 or f32;
//            maxima (n_heads, n_splits_max, 2) f32: maximum and sum of a chunk; sums (n_heads, n_splits_max, head_dim)
//            f32; tickets (n_kv_heads,) u32, zero before and after
// Needs      head_dim even, at most 256; checked in cuda::launch
// Grid       (n_kv_heads, n_splits_max); chunks past the last position leave at once
// Block      256 threads, one chunk for all query heads of a key/value head, GROUP of them at a time
// Warp       LANES lanes hold one position, 8 dimensions each: 32 / LANES positions at once, 2 or 4 of them in flight
// Bytes      2 * n_kv_heads * (position + 1) * head_dim * sizeof(Cache)
// Order      positions to chunks, chunks to warps and all merges are fixed by the position; an integer ticket says which
//            block merges: repeatable bit for bit

#include "common.cuh"

constexpr int ATTENTION_WARPS = 8;
constexpr int MIN_CHUNK = 64;
constexpr int LANE_DIMS = 8;

struct AttentionArgs {
    const float* q;
    const void* k;
    const void* v;
    float* out;
    float* maxima;
    float* sums;
    uint32_t* tickets;
    const State* state;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t n_positions_max;
    float scale;  // log2(e) / sqrt(head_dim)
};

// LANE_DIMS elements from dim on, zeros past head_dim.
template <typename Cache>
__device__ __forceinline__ void load_dims(const Cache* row, int dim, int head_dim, float (&out)[LANE_DIMS]) {
    if (head_dim % LANE_DIMS == 0) {
#pragma unroll
        for (int i = 0; i < LANE_DIMS / PER_LOAD<Cache>; i++) {
            float part[PER_LOAD<Cache>] = {};
            if (dim < head_dim) {
                unpack<Cache>(__ldcg(reinterpret_cast<const uint4*>(row + dim) + i), part);
            }
#pragma unroll
            for (int j = 0; j < PER_LOAD<Cache>; j++) {
                out[i * PER_LOAD<Cache> + j] = part[j];
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < LANE_DIMS; i++) {
            out[i] = dim + i < head_dim ? to_f32(row[dim + i]) : 0.0f;
        }
    }
}

// Positions that a lane group has in flight: what the registers of GROUP query heads leave room for.
template <int GROUP>
constexpr int POSITIONS_FOR = GROUP == 4 ? 2 : 4;

template <int LANES, int GROUP, typename Cache>
__device__ __forceinline__ void attention(const AttentionArgs& a) {
    __shared__ float warp_sums[ATTENTION_WARPS][GROUP][LANES * LANE_DIMS];
    __shared__ float warp_maxima[ATTENTION_WARPS][GROUP][2];
    __shared__ bool last;

    constexpr int POSITIONS = POSITIONS_FOR<GROUP>;
    const int kv_head = blockIdx.x;
    const int group = a.n_heads / a.n_kv_heads;
    const int dim = lane_id() % LANES * LANE_DIMS;
    const int64_t base = static_cast<int64_t>(kv_head) * a.n_positions_max * a.head_dim;
    const Cache* k = static_cast<const Cache*>(a.k) + base;
    const Cache* v = static_cast<const Cache*>(a.v) + base;
    wait_for_previous();

    const int n_positions = min(static_cast<int>(__ldcg(&a.state->position)) + 1, a.n_positions_max);
    const int even = (n_positions + gridDim.y - 1) / gridDim.y;
    const int chunk = max(MIN_CHUNK, (even + 7) / 8 * 8);
    const int n_splits = (n_positions + chunk - 1) / chunk;
    const int split = blockIdx.y;
    if (split >= n_splits) {
        return;
    }
    const int begin = split * chunk;
    const int end = min(begin + chunk, n_positions);

    for (int first_head = kv_head * group; first_head < (kv_head + 1) * group; first_head += GROUP) {
        float q[GROUP][LANE_DIMS];
        float sums[GROUP][LANE_DIMS] = {};
        float maximum[GROUP];
        float total[GROUP] = {};
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            maximum[g] = -INFINITY;
#pragma unroll
            for (int i = 0; i < LANE_DIMS; i++) {
                const bool in = dim + i < a.head_dim;
                q[g][i] = in ? __ldcg(a.q + (first_head + g) * a.head_dim + dim + i) * a.scale : 0.0f;
            }
        }

        constexpr int AT_ONCE = WARP / LANES;
        for (int p = begin + warp_id() * AT_ONCE * POSITIONS; p < end; p += ATTENTION_WARPS * AT_ONCE * POSITIONS) {
            float keys[POSITIONS][LANE_DIMS];
            float values[POSITIONS][LANE_DIMS];
#pragma unroll
            for (int j = 0; j < POSITIONS; j++) {
                const int at = min(p + j * AT_ONCE + lane_id() / LANES, end - 1);
                load_dims(k + static_cast<int64_t>(at) * a.head_dim, dim, a.head_dim, keys[j]);
                load_dims(v + static_cast<int64_t>(at) * a.head_dim, dim, a.head_dim, values[j]);
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float scores[POSITIONS];
                float larger = maximum[g];
#pragma unroll
                for (int j = 0; j < POSITIONS; j++) {
                    float score = 0.0f;
#pragma unroll
                    for (int i = 0; i < LANE_DIMS; i++) {
                        score = fmaf(q[g][i], keys[j][i], score);
                    }
#pragma unroll
                    for (int offset = LANES / 2; offset > 0; offset /= 2) {
                        score += __shfl_xor_sync(0xffffffffu, score, offset);
                    }
                    const bool in = p + j * AT_ONCE + lane_id() / LANES < end;
                    scores[j] = in ? score : -INFINITY;
                    larger = fmaxf(larger, scores[j]);
                }
                const float factor = rescale(maximum[g], larger);
                maximum[g] = larger;
                total[g] *= factor;
#pragma unroll
                for (int i = 0; i < LANE_DIMS; i++) {
                    sums[g][i] *= factor;
                }
#pragma unroll
                for (int j = 0; j < POSITIONS; j++) {
                    const float weight = rescale(scores[j], larger);
                    total[g] += weight;
#pragma unroll
                    for (int i = 0; i < LANE_DIMS; i++) {
                        sums[g][i] = fmaf(weight, values[j][i], sums[g][i]);
                    }
                }
            }
        }

        // The positions that the lanes of a warp hold side by side, then the warps.
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float larger = maximum[g];
#pragma unroll
            for (int offset = LANES; offset < WARP; offset *= 2) {
                larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, offset));
            }
            const float factor = rescale(maximum[g], larger);
            total[g] *= factor;
#pragma unroll
            for (int i = 0; i < LANE_DIMS; i++) {
                sums[g][i] *= factor;
            }
#pragma unroll
            for (int offset = LANES; offset < WARP; offset *= 2) {
                total[g] += __shfl_xor_sync(0xffffffffu, total[g], offset);
#pragma unroll
                for (int i = 0; i < LANE_DIMS; i++) {
                    sums[g][i] += __shfl_xor_sync(0xffffffffu, sums[g][i], offset);
                }
            }
            if (lane_id() < LANES) {
#pragma unroll
                for (int i = 0; i < LANE_DIMS; i++) {
                    warp_sums[warp_id()][g][dim + i] = sums[g][i];
                }
            }
            if (lane_id() == 0) {
                warp_maxima[warp_id()][g][0] = larger;
                warp_maxima[warp_id()][g][1] = total[g];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP * a.head_dim; i += blockDim.x) {
            const int g = i / a.head_dim;
            const int d = i - g * a.head_dim;
            const int head = first_head + g;
            float larger = -INFINITY;
#pragma unroll
            for (int warp = 0; warp < ATTENTION_WARPS; warp++) {
                larger = fmaxf(larger, warp_maxima[warp][g][0]);
            }
            float sum = 0.0f;
            float all = 0.0f;
#pragma unroll
            for (int warp = 0; warp < ATTENTION_WARPS; warp++) {
                const float factor = rescale(warp_maxima[warp][g][0], larger);
                sum = fmaf(factor, warp_sums[warp][g][d], sum);
                all = fmaf(factor, warp_maxima[warp][g][1], all);
            }
            if (n_splits == 1) {
                a.out[head * a.head_dim + d] = sum / all;
            } else {
                const int64_t at = static_cast<int64_t>(head) * gridDim.y + split;
                __stcg(a.sums + at * a.head_dim + d, sum);
                if (d == 0) {
                    __stcg(a.maxima + 2 * at, larger);
                    __stcg(a.maxima + 2 * at + 1, all);
                }
            }
        }
        __syncthreads();
    }
    if (n_splits == 1) {
        return;
    }

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.tickets + kv_head, 1) == n_splits - 1;
    }
    __syncthreads();
    if (!last) {
        return;
    }
    __threadfence();
    for (int i = threadIdx.x; i < group * a.head_dim; i += blockDim.x) {
        const int g = i / a.head_dim;
        const int d = i - g * a.head_dim;
        const int head = kv_head * group + g;
        const int64_t first = static_cast<int64_t>(head) * gridDim.y;
        float larger = -INFINITY;
#pragma unroll 8
        for (int s = 0; s < n_splits; s++) {
            larger = fmaxf(larger, __ldcg(a.maxima + 2 * (first + s)));
        }
        float sum = 0.0f;
        float all = 0.0f;
#pragma unroll 8
        for (int s = 0; s < n_splits; s++) {
            const float factor = rescale(__ldcg(a.maxima + 2 * (first + s)), larger);
            sum = fmaf(factor, __ldcg(a.sums + (first + s) * a.head_dim + d), sum);
            all = fmaf(factor, __ldcg(a.maxima + 2 * (first + s) + 1), all);
        }
        a.out[head * a.head_dim + d] = sum / all;
    }
    if (threadIdx.x == 0) {
        a.tickets[kv_head] = 0;
    }
}

#define ATTENTION(LANES, GROUP, NAME, CACHE)                                                      \
    extern "C" __global__ __launch_bounds__(256, 2) void attention_##NAME##_##LANES##_##GROUP(    \
        const __grid_constant__ AttentionArgs a                                                   \
    ) {                                                                                           \
        attention<LANES, GROUP, CACHE>(a);                                                        \
    }
#define ATTENTION_GROUPS(LANES, NAME, CACHE) \
    ATTENTION(LANES, 1, NAME, CACHE)         \
    ATTENTION(LANES, 2, NAME, CACHE)         \
    ATTENTION(LANES, 4, NAME, CACHE)
#define ATTENTION_LANES(NAME, CACHE)      \
    ATTENTION_GROUPS(4, NAME, CACHE)      \
    ATTENTION_GROUPS(8, NAME, CACHE)      \
    ATTENTION_GROUPS(16, NAME, CACHE)     \
    ATTENTION_GROUPS(32, NAME, CACHE)
ATTENTION_LANES(f16, __half)
ATTENTION_LANES(f32, float)
