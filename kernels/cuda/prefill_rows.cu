// prefill_rows: the rows of a batch of tokens, before and between the matrix products.

#include "prefill.cuh"

// prefill_embed: the rows of the embedding that the tokens name.
//
// Computes   x[t] = w[tokens[t]] as f32
// Reference  equal bit for bit
// Shapes     tokens (n_tokens,) u32; w (vocab_size, n_cols) row-major; x (n_tokens, n_cols) f32
// Needs      tokens below vocab_size; a larger one reads the last row
// Grid       (ceil(n_cols / 1024), n_tokens); 256 threads, four columns each
// Bytes      n_tokens * n_cols * (sizeof(T) + 4)
struct PrefillEmbedArgs {
    const uint32_t* tokens;
    const void* w;
    float* x;
    int32_t n_rows;
    int32_t n_cols;
};

template <typename T>
__device__ __forceinline__ void prefill_embed(const PrefillEmbedArgs& a) {
    const int64_t token = blockIdx.y;
    wait_for_previous();
    const int64_t id = min(a.tokens[token], static_cast<uint32_t>(a.n_rows - 1));
    const T* row = static_cast<const T*>(a.w) + id * a.n_cols;
    float* x = a.x + token * a.n_cols;
    for_columns(
        blockIdx.x * 4 * blockDim.x, a.n_cols, [&](int col) { return row[col]; },
        [&](int col, T v) { x[col] = to_f32(v); });
}

extern "C" __global__ __launch_bounds__(256) void prefill_embed_f32(const __grid_constant__ PrefillEmbedArgs a) {
    prefill_embed<float>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_embed_f16(const __grid_constant__ PrefillEmbedArgs a) {
    prefill_embed<__half>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_embed_bf16(const __grid_constant__ PrefillEmbedArgs a) {
    prefill_embed<__nv_bfloat16>(a);
}

// prefill_norm: RMSNorm of every token, in the type that the next product reads, and the signs for the predictor.
//
// Computes   n = x / sqrt(mean(x^2) + eps) * weight;  out = round(n);  bit c % 32 of signs[t, c / 32] = n[c] < 0
// Reference  reference::{rmsnorm, sign_pack}; within TOLERANCE and the rounding of out; signs are those of n in f32
// Shapes     x (n_tokens, n_cols) f32; weight (n_cols,) f32; out (PLANES, n_tokens, n_cols);
//            signs (n_tokens, ceil(n_cols / 32)) u32, or null
// Grid       n_tokens blocks of 256 threads
// Warp       32 neighbouring columns at a time, so that a ballot is a sign word
// Bytes      n_tokens * n_cols * (4 + PLANES * sizeof(T)); the second reading of x comes from a cache
// Order      one fixed tree of additions: repeatable bit for bit
struct PrefillNormArgs {
    const float* x;
    const float* weight;
    void* out;
    uint32_t* signs;
    int32_t n_tokens;
    int32_t n_cols;
    float eps;
};

template <typename T>
__device__ __forceinline__ void prefill_norm(const PrefillNormArgs& a) {
    __shared__ float scratch[WARP];
    const int64_t token = blockIdx.x;
    const int64_t plane = static_cast<int64_t>(a.n_tokens) * a.n_cols;
    const int n_words = (a.n_cols + WARP - 1) / WARP;
    const float* x = a.x + token * a.n_cols;
    T* out = static_cast<T*>(a.out) + token * a.n_cols;

    wait_for_previous();
    const float scale = norm_factor(x, a.n_cols, a.eps, scratch);
    for (int first = 0; first < n_words * WARP; first += 4 * blockDim.x) {
        for_columns(
            first, n_words * WARP,
            [&](int col) { return col < a.n_cols ? x[col] * scale * a.weight[col] : 0.0f; },
            [&](int col, float n) {
                if (col < a.n_cols) {
                    store_rounded(out + col, plane, n);
                }
                if (a.signs != nullptr) {
                    const uint32_t word = __ballot_sync(0xffffffffu, n < 0.0f);
                    if (lane_id() == 0) {
                        a.signs[token * n_words + col / WARP] = word;
                    }
                }
            });
    }
}

extern "C" __global__ __launch_bounds__(256) void prefill_norm_f32(const __grid_constant__ PrefillNormArgs a) {
    prefill_norm<float>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_norm_f16(const __grid_constant__ PrefillNormArgs a) {
    prefill_norm<__half>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_norm_bf16(const __grid_constant__ PrefillNormArgs a) {
    prefill_norm<__nv_bfloat16>(a);
}

// prefill_rope: queries and keys rotated, keys and values appended to the cache.
//
// Computes   (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + head_dim / 2) of every head of q and k;
//            k_cache[h, first_position + t] = k[t, h], v likewise
// Reference  reference::rope; within TOLERANCE and the rounding of the cache's type
// Shapes     q (n_tokens, n_heads, head_dim), k and v (n_tokens, n_kv_heads, head_dim) f32, their rows q_stride,
//            k_stride and v_stride elements apart; rotated (n_tokens, n_heads, head_dim) and the caches of one layer
//            (n_kv_heads, n_positions_max, head_dim) f16, or f32 for f32 weights; cos, sin
//            (n_positions_max, head_dim / 2) f32
// Needs      head_dim even; first_position + n_tokens <= n_positions_max
// Grid       (ceil(pairs of a token / 1024), n_tokens); 256 threads, four pairs each
// Bytes      n_tokens * (n_heads + 2 n_kv_heads) * head_dim * (4 + sizeof(Cache))
struct PrefillRopeArgs {
    const float* q;
    const float* k;
    const float* v;
    const float* cos;
    const float* sin;
    void* rotated;
    void* k_cache;
    void* v_cache;
    int64_t q_stride;
    int64_t k_stride;
    int64_t v_stride;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t n_positions_max;
    int32_t first_position;
};

template <typename Cache>
__device__ __forceinline__ void prefill_rope(const PrefillRopeArgs& a) {
    const int64_t token = blockIdx.y;
    const int64_t position = a.first_position + token;
    const int half = a.head_dim / 2;
    const int first_key_pair = a.n_heads * half;
    const int first_value_pair = first_key_pair + a.n_kv_heads * half;
    wait_for_previous();
    for_columns(
        blockIdx.x * 4 * blockDim.x, first_value_pair + a.n_kv_heads * half,
        [&](int pair) {
            const int head = pair / half;
            const int dim = pair - head * half;
            const float* in = a.q + token * a.q_stride + head * a.head_dim;
            if (pair >= first_value_pair) {
                in = a.v + token * a.v_stride + (head - a.n_heads - a.n_kv_heads) * a.head_dim;
            } else if (pair >= first_key_pair) {
                in = a.k + token * a.k_stride + (head - a.n_heads) * a.head_dim;
            }
            const float first = in[dim];
            const float second = in[dim + half];
            if (pair >= first_value_pair) {
                return make_float2(first, second);
            }
            const float c = a.cos[position * half + dim];
            const float s = a.sin[position * half + dim];
            return make_float2(first * c - second * s, second * c + first * s);
        },
        [&](int pair, float2 rotated) {
            const int head = pair / half;
            const int dim = pair - head * half;
            Cache* out = static_cast<Cache*>(a.rotated) + (token * a.n_heads + head) * a.head_dim;
            if (pair >= first_key_pair) {
                const bool is_key = pair < first_value_pair;
                const int64_t kv_head = head - a.n_heads - (is_key ? 0 : a.n_kv_heads);
                out = static_cast<Cache*>(is_key ? a.k_cache : a.v_cache) +
                      (kv_head * a.n_positions_max + position) * a.head_dim;
            }
            from_f32(rotated.x, out[dim]);
            from_f32(rotated.y, out[dim + half]);
        });
}

extern "C" __global__ __launch_bounds__(256) void prefill_rope_f32(const __grid_constant__ PrefillRopeArgs a) {
    prefill_rope<float>(a);
}
extern "C" __global__ __launch_bounds__(256) void prefill_rope_f16(const __grid_constant__ PrefillRopeArgs a) {
    prefill_rope<__half>(a);
}
