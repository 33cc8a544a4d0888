// matvec: one matrix times one vector; the output projection with its residual, and lm_head with its norm.
//
// Computes   y = w v, or y += w v with accumulate;  v = x, or rmsnorm(x) where there is a norm weight
// Reference  reference::{matvec, rmsnorm}; within TOLERANCE (sum order)
// Shapes     w (n_rows, n_cols) row-major; x (n_cols,) f32; norm (n_cols,) f32 or null; y (n_rows,) f32
// Needs      any n_cols (16-byte loads where rows are multiples of 16 bytes); checked in cuda::launch
// Grid       about one block for each SM; a block takes a contiguous run of rows
// Block      512 threads; shared memory: v by slot, one float for each segment of its rows
// Warp       one segment of one row at a time, 16-byte loads, shuffle-reduce
// Bytes      n_rows * n_cols * sizeof(T)
// Order      each y[i] is one fixed sequence of additions, no atomics: repeatable bit for bit

#include "dot.cuh"

struct MatvecArgs {
    RowCut cut;
    const void* w;
    const float* x;
    const float* norm;
    float* y;
    int32_t n_rows;
    int32_t accumulate;
    float eps;
};

template <typename T>
__device__ __forceinline__ void matvec(const MatvecArgs& a) {
    extern __shared__ float4 shared[];
    __shared__ float scratch[WARP];
    float* slots = reinterpret_cast<float*>(shared);
    float* partials = slots + n_slots<T>(a.cut);

    const int begin = share_begin(a.n_rows, blockIdx.x, gridDim.x);
    const int n_rows = share_begin(a.n_rows, blockIdx.x + 1, gridDim.x) - begin;
    const T* w = static_cast<const T*>(a.w) + static_cast<int64_t>(begin) * a.cut.n_cols;
    const auto row_of = [&](int i) { return w + static_cast<int64_t>(i) * a.cut.n_cols; };

    if (a.norm != nullptr) {
        prefetch_norm(a.norm, a.cut.n_cols);
    }
    prefetch_first_items<T>(a.cut, n_rows, row_of);
    wait_for_previous();

    if (a.norm != nullptr) {
        load_normalised<T>(a.cut, a.x, a.norm, a.eps, slots, nullptr, scratch);
    } else {
        load_vector<T>(a.cut, a.x, slots);
    }
    __syncthreads();
    dot_items<T>(a.cut, n_rows, slots, partials, row_of);
    __syncthreads();

    for (int i = threadIdx.x; i < n_rows; i += blockDim.x) {
        const float old = a.accumulate ? __ldcg(a.y + begin + i) : 0.0f;
        a.y[begin + i] = old + row_total(a.cut, partials, i);
    }
}

extern "C" __global__ __launch_bounds__(512, 2) void matvec_f32(const __grid_constant__ MatvecArgs a) {
    matvec<float>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void matvec_f16(const __grid_constant__ MatvecArgs a) {
    matvec<__half>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void matvec_bf16(const __grid_constant__ MatvecArgs a) {
    matvec<__nv_bfloat16>(a);
}
