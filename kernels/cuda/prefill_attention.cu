// prefill_attention: causal attention of a batch of tokens over the cache, which already holds their keys and values.
//
// Computes   out[t, h] = softmax(q[t, h] . k / sqrt(head_dim)) v over positions 0..=first_position + t of head h's
//            key/value head
// Source     FlashAttention-2 (Dao 2023, arXiv 2307.08691): tiles of keys, running maximum and sum; nothing of size
//            tokens x positions exists
// Reference  reference::attention; within TOLERANCE (sum order, exp2, weights rounded to f16) and the rounding of out
// Shapes     q (n_tokens, n_heads, head_dim), k and v (n_kv_heads, n_positions_max, head_dim) f16 or f32;
//            out (PLANES, n_tokens, n_heads, head_dim)
// Needs      first_position + n_tokens <= n_positions_max
// Measured   H100, 32 heads of 128, f16: 512 tokens 28 to 35 us, after 3584 others 169 to 189 us;
//            record 2026-11-25-h100-prompt
// Order      one block sees all positions of its queries, in order: repeatable bit for bit

#include "prefill.cuh"

struct PrefillAttentionArgs {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    int32_t n_tokens;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t n_positions_max;
    int32_t first_position;
    float scale;  // log2(e) / sqrt(head_dim): exponentials are powers of two
};

// Tensor cores: head_dim 32, 64, 80, 96 and 128 over a cache of f16.
//
// Grid       (ceil(n_tokens / 64), n_heads), the longest rows first
// Block      128 threads, 64 queries; shared memory: two tiles of 64 keys and two of their values, rows padded by 16
//            bytes so that the eight rows of a matrix lie in different banks
// Warp       16 queries against all 64 keys of a tile: scores and weights stay in registers, as the layout of sums is
//            that of inputs
// Bytes      for each block 4 * head_dim * positions, mostly from L2
constexpr int QUERIES = 64;
constexpr int KEYS = 64;

template <int DIM>
struct AttentionTiles {
    static constexpr int STRIDE = DIM + 8;
    __half k[2][KEYS][STRIDE];
    __half v[2][KEYS][STRIDE];
};

// The rows of the tile that begins at position first, zeros past the last position: weights there are zero, and zero
// times what nobody wrote may be NaN.
template <int DIM>
__device__ __forceinline__ void load_tile(
    __half (&tile)[KEYS][DIM + 8], const __half* rows, int first, int n_positions
) {
    constexpr int CHUNKS = DIM / 8;
#pragma unroll
    for (int i = threadIdx.x; i < KEYS * CHUNKS; i += 2 * QUERIES) {
        const int key = i / CHUNKS;
        const int dim = i % CHUNKS * 8;
        const bool in = first + key < n_positions;
        copy_async(&tile[key][dim], rows + static_cast<int64_t>(in ? first + key : 0) * DIM + dim, in);
    }
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <int DIM, typename Out>
__device__ __forceinline__ void prefill_attention(const PrefillAttentionArgs& a) {
    extern __shared__ float4 shared[];
    AttentionTiles<DIM>& tiles = *reinterpret_cast<AttentionTiles<DIM>*>(shared);

    const int head = blockIdx.y;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const int n_queries = min(QUERIES, a.n_tokens - first_query);
    const int n_positions = a.first_position + first_query + n_queries;
    const int64_t base = static_cast<int64_t>(head / (a.n_heads / a.n_kv_heads)) * a.n_positions_max * DIM;
    const __half* k = static_cast<const __half*>(a.k) + base;
    const __half* v = static_cast<const __half*>(a.v) + base;
    const int64_t width = static_cast<int64_t>(a.n_heads) * DIM;

    wait_for_previous();
    load_tile<DIM>(tiles.k[0], k, 0, n_positions);
    load_tile<DIM>(tiles.v[0], v, 0, n_positions);
    commit_copies();

    // This lane's two queries, past the last one again the last: what they give is not stored.
    const int pair = lane_id() % 4 * 2;
    int query[2];
    uint32_t q[DIM / 16][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        query[i] = first_query + warp_id() * 16 + lane_id() / 4 + 8 * i;
        const __half* row = static_cast<const __half*>(a.q) + min(query[i], a.n_tokens - 1) * width + head * DIM + pair;
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
            q[step][i] = *reinterpret_cast<const uint32_t*>(row + step * 16);
            q[step][i + 2] = *reinterpret_cast<const uint32_t*>(row + step * 16 + 8);
        }
    }

    float sums[DIM / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY};
    float total[2] = {};
    const int n_tiles = (n_positions + KEYS - 1) / KEYS;
    for (int tile = 0; tile < n_tiles; tile++) {
        const int first_key = tile * KEYS;
        if (tile + 1 < n_tiles) {
            load_tile<DIM>(tiles.k[(tile + 1) % 2], k, first_key + KEYS, n_positions);
            load_tile<DIM>(tiles.v[(tile + 1) % 2], v, first_key + KEYS, n_positions);
        }
        commit_copies();
        wait_copies<1>();
        __syncthreads();

        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
#pragma unroll
            for (int keys = 0; keys < KEYS; keys += 16) {
                uint32_t b[4];
                const int key = keys + lane_id() % 8 + lane_id() / 16 * 8;
                load_matrices(b, &tiles.k[tile % 2][key][step * 16 + lane_id() / 8 % 2 * 8]);
                multiply_matrices<__half>(scores[keys / 8], q[step], b[0], b[1]);
                multiply_matrices<__half>(scores[keys / 8 + 1], q[step], b[2], b[3]);
            }
        }

        // Scores become weights relative to the largest so far. A query sees position 0, which the first tile holds,
        // so that the maximum is finite from then on.
        const bool masked = first_key + KEYS > a.first_position + first_query + warp_id() * 16 + 1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float larger = maximum[i];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = scores[n][2 * i + j];
                    const bool in = !masked || first_key + n * 8 + pair + j <= a.first_position + query[i];
                    score = in ? score * a.scale : -INFINITY;
                    larger = fmaxf(larger, score);
                }
            }
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
            const float factor = exp2f(maximum[i] - larger);
            maximum[i] = larger;
            total[i] *= factor;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                sums[n][2 * i] *= factor;
                sums[n][2 * i + 1] *= factor;
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = scores[n][2 * i + j];
                    score = exp2f(score - larger);
                    total[i] += score;
                }
            }
        }

#pragma unroll
        for (int keys = 0; keys < KEYS; keys += 16) {
            const float(&low)[4] = scores[keys / 8];
            const float(&high)[4] = scores[keys / 8 + 1];
            const uint32_t weights[4] = {
                pack_halves(low[0], low[1]), pack_halves(low[2], low[3]), pack_halves(high[0], high[1]),
                pack_halves(high[2], high[3])};
#pragma unroll
            for (int dim = 0; dim < DIM; dim += 16) {
                uint32_t b[4];
                load_matrices_t(b, &tiles.v[tile % 2][keys + lane_id() % 16][dim + lane_id() / 16 * 8]);
                multiply_matrices<__half>(sums[dim / 8], weights, b[0], b[1]);
                multiply_matrices<__half>(sums[dim / 8 + 1], weights, b[2], b[3]);
            }
        }
        // The next turn copies over this tile.
        __syncthreads();
    }

    const int64_t plane = a.n_tokens * width;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(0xffffffffu, total[i], 1);
        total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2);
        if (query[i] < a.n_tokens) {
            Out* out = static_cast<Out*>(a.out) + query[i] * width + head * DIM + pair;
            const float scale = 1.0f / total[i];
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                store_rounded(out + n * 8, plane, sums[n][2 * i] * scale);
                store_rounded(out + n * 8 + 1, plane, sums[n][2 * i + 1] * scale);
            }
        }
    }
}

#define PREFILL_ATTENTION(DIM)                                                          \
    extern "C" __global__ __launch_bounds__(2 * QUERIES) void prefill_attention_f16_##DIM( \
        const __grid_constant__ PrefillAttentionArgs a                                  \
    ) {                                                                                 \
        prefill_attention<DIM, __half>(a);                                              \
    }                                                                                   \
    extern "C" __global__ __launch_bounds__(2 * QUERIES) void prefill_attention_bf16_##DIM( \
        const __grid_constant__ PrefillAttentionArgs a                                  \
    ) {                                                                                 \
        prefill_attention<DIM, __nv_bfloat16>(a);                                       \
    }

PREFILL_ATTENTION(32)
PREFILL_ATTENTION(64)
PREFILL_ATTENTION(80)
PREFILL_ATTENTION(96)
PREFILL_ATTENTION(128)

// Any other head_dim up to 256, and a cache of f32.
//
// Grid       (ceil(n_tokens / 8), n_heads), the longest rows first
// Block      256 threads, 8 queries; shared memory: a tile of 32 keys, then of their values, and the queries
// Warp       one query: a lane holds the score of one key, then eight dimensions of the sum
constexpr int PLAIN_QUERIES = 8;
constexpr int PLAIN_DIMS = 256;

template <typename Cache, typename Out>
__device__ __forceinline__ void prefill_attention_plain(const PrefillAttentionArgs& a) {
    // One element more than a row has: a warp reads 32 rows at the same column.
    __shared__ float tile[WARP][PLAIN_DIMS + 1];
    __shared__ float queries[PLAIN_QUERIES][PLAIN_DIMS];

    const int head = blockIdx.y;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * PLAIN_QUERIES;
    const int query = min(first_query + warp_id(), a.n_tokens - 1);
    const int last_query = min(first_query + PLAIN_QUERIES, a.n_tokens) - 1;
    const int64_t base = static_cast<int64_t>(head / (a.n_heads / a.n_kv_heads)) * a.n_positions_max * a.head_dim;
    const int64_t at = (static_cast<int64_t>(query) * a.n_heads + head) * a.head_dim;
    const int position = a.first_position + query;

    wait_for_previous();
    for (int dim = lane_id(); dim < a.head_dim; dim += WARP) {
        queries[warp_id()][dim] = to_f32(static_cast<const Cache*>(a.q)[at + dim]) * a.scale;
    }
    const auto load = [&](const void* rows, int first_key) {
        __syncthreads();
        for (int i = threadIdx.x; i < WARP * a.head_dim; i += blockDim.x) {
            const int key = i / a.head_dim;
            const bool in = first_key + key <= a.first_position + last_query;
            const int64_t element = base + static_cast<int64_t>(first_key) * a.head_dim + i;
            tile[key][i - key * a.head_dim] = in ? to_f32(static_cast<const Cache*>(rows)[element]) : 0.0f;
        }
        __syncthreads();
    };

    float sums[PLAIN_DIMS / WARP] = {};
    float maximum = -INFINITY;
    float total = 0.0f;
    for (int first_key = 0; first_key <= a.first_position + last_query; first_key += WARP) {
        load(a.k, first_key);
        float score = 0.0f;
        for (int dim = 0; dim < a.head_dim; dim++) {
            score = fmaf(queries[warp_id()][dim], tile[lane_id()][dim], score);
        }
        score = first_key + lane_id() <= position ? score : -INFINITY;
        float larger = fmaxf(maximum, score);
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, offset));
        }
        const float factor = exp2f(maximum - larger);
        const float weight = exp2f(score - larger);
        maximum = larger;
        total = fmaf(total, factor, warp_sum(weight));
        load(a.v, first_key);
#pragma unroll
        for (int i = 0; i < PLAIN_DIMS / WARP; i++) {
            sums[i] *= factor;
        }
        for (int key = 0; key < WARP; key++) {
            const float of_key = __shfl_sync(0xffffffffu, weight, key);
#pragma unroll
            for (int i = 0; i < PLAIN_DIMS / WARP; i++) {
                const int dim = i * WARP + lane_id();
                if (dim < a.head_dim) {
                    sums[i] = fmaf(of_key, tile[key][dim], sums[i]);
                }
            }
        }
    }
    if (first_query + warp_id() < a.n_tokens) {
        const int64_t plane = static_cast<int64_t>(a.n_tokens) * a.n_heads * a.head_dim;
#pragma unroll
        for (int i = 0; i < PLAIN_DIMS / WARP; i++) {
            const int dim = i * WARP + lane_id();
            if (dim < a.head_dim) {
                store_rounded(static_cast<Out*>(a.out) + at + dim, plane, sums[i] / total);
            }
        }
    }
}

extern "C" __global__ __launch_bounds__(256) void prefill_attention_plain_f32(
    const __grid_constant__ PrefillAttentionArgs a
) {
    prefill_attention_plain<float, float>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_attention_plain_f16(
    const __grid_constant__ PrefillAttentionArgs a
) {
    prefill_attention_plain<__half, __half>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_attention_plain_bf16(
    const __grid_constant__ PrefillAttentionArgs a
) {
    prefill_attention_plain<__half, __nv_bfloat16>(a);
}
