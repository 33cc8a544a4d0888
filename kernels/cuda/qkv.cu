// qkv: queries, keys and values of one token, rotated, keys and values appended to the cache.
//
// Computes   n = rmsnorm(x);  q = rope(w_q n);  k = rope(w_k n);  v = w_v n;  cache[position] = (k, v)
// Reference  reference::{rmsnorm, matvec, rope}; within TOLERANCE (sum order; k and v round to the cache's type)
// Shapes     x (n_cols,) f32; w_q (n_heads * head_dim, n_cols), w_k and w_v (n_kv_heads * head_dim, n_cols) row-major;
//            cos, sin (n_positions_max, head_dim / 2) f32; q (n_heads, head_dim) f32; k, v cache of one layer
//            (n_kv_heads, n_positions_max, head_dim), f16, or f32 for f32 weights
// Needs      head_dim even; any n_cols (16-byte loads where rows are multiples of 16 bytes); checked in cuda::launch
// Grid       about one block for each SM; a block takes a contiguous run of row pairs (i, i + head_dim / 2) of the heads
//            of q, k and v, so that it can rotate what it computes
// Block      512 threads; shared memory: x by slot, one float for each segment of its rows
// Warp       one segment of one row at a time, 16-byte loads, shuffle-reduce
// Bytes      weights (n_heads + 2 n_kv_heads) * head_dim * n_cols * sizeof(T)
// Order      each sum in one fixed order, no atomics: repeatable bit for bit

#include "dot.cuh"

struct QkvArgs {
    RowCut cut;
    const void* w_q;
    const void* w_k;
    const void* w_v;
    const float* x;
    const float* norm;
    const float* cos;
    const float* sin;
    float* q;
    void* k_cache;
    void* v_cache;
    const State* state;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t n_positions_max;
    float eps;
};

template <typename T, typename Cache>
__device__ __forceinline__ void qkv(const QkvArgs& a) {
    extern __shared__ float4 shared[];
    __shared__ float scratch[WARP];
    float* slots = reinterpret_cast<float*>(shared);
    float* partials = slots + n_slots<T>(a.cut);

    const int half = a.head_dim / 2;
    const int n_pairs = (a.n_heads + 2 * a.n_kv_heads) * half;
    const int begin = share_begin(n_pairs, blockIdx.x, gridDim.x);
    const int n_rows = 2 * (share_begin(n_pairs, blockIdx.x + 1, gridDim.x) - begin);

    const auto row_of = [&](int i) {
        const int pair = begin + i / 2;
        int head = pair / half;
        const int dim = pair - head * half + (i & 1) * half;
        const void* w = a.w_q;
        if (head >= a.n_heads + a.n_kv_heads) {
            head -= a.n_heads + a.n_kv_heads;
            w = a.w_v;
        } else if (head >= a.n_heads) {
            head -= a.n_heads;
            w = a.w_k;
        }
        return static_cast<const T*>(w) + static_cast<int64_t>(head * a.head_dim + dim) * a.cut.n_cols;
    };

    prefetch_norm(a.norm, a.cut.n_cols);
    prefetch_first_items<T>(a.cut, n_rows, row_of);
    wait_for_previous();

    load_normalised<T>(a.cut, a.x, a.norm, a.eps, slots, nullptr, scratch);
    __syncthreads();
    dot_items<T>(a.cut, n_rows, slots, partials, row_of);
    const int position = static_cast<int>(__ldcg(&a.state->position));
    __syncthreads();
    if (position >= a.n_positions_max) {
        return;
    }

    for (int i = threadIdx.x; i < n_rows / 2; i += blockDim.x) {
        const int pair = begin + i;
        int head = pair / half;
        const int dim = pair - head * half;
        float first = row_total(a.cut, partials, 2 * i);
        float second = row_total(a.cut, partials, 2 * i + 1);
        if (head < a.n_heads + a.n_kv_heads) {
            const float c = __ldg(a.cos + static_cast<int64_t>(position) * half + dim);
            const float s = __ldg(a.sin + static_cast<int64_t>(position) * half + dim);
            const float rotated = first * c - second * s;
            second = second * c + first * s;
            first = rotated;
        }
        if (head < a.n_heads) {
            a.q[head * a.head_dim + dim] = first;
            a.q[head * a.head_dim + dim + half] = second;
        } else {
            head -= a.n_heads;
            Cache* cache = static_cast<Cache*>(a.k_cache);
            if (head >= a.n_kv_heads) {
                head -= a.n_kv_heads;
                cache = static_cast<Cache*>(a.v_cache);
            }
            Cache* at = cache + (static_cast<int64_t>(head) * a.n_positions_max + position) * a.head_dim + dim;
            from_f32(first, at[0]);
            from_f32(second, at[half]);
        }
    }
}

extern "C" __global__ __launch_bounds__(512, 2) void qkv_f32(const __grid_constant__ QkvArgs a) {
    qkv<float, float>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void qkv_f16(const __grid_constant__ QkvArgs a) {
    qkv<__half, __half>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void qkv_bf16(const __grid_constant__ QkvArgs a) {
    qkv<__nv_bfloat16, __half>(a);
}
