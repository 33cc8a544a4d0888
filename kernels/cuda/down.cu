// down: the down projection of one token over the rows whose h is not zero, added to the residual.
//
// Computes   x += sum over i of h[i] * w_down_t[i]
// Reference  reference::down; within TOLERANCE (sum order)
// Shapes     h (n_rows,) f32; w_down_t (n_rows, n_cols) row-major; x (n_cols,) f32; partials (n_chunks, n_cols) f32;
//            tickets (gridDim.x,) u32, zero before and after
// Needs      any n_cols (16-byte loads where rows are multiples of 16 bytes); checked in cuda::launch
// Grid       (ceil(n_cols / 256), n_chunks): 256 columns of one contiguous chunk of rows
// Block      256 threads; shared memory: the chunk's rows that count, with their h, in row order
// Warp       every 8th of those rows; a lane adds 8 columns in registers, 8 rows in flight
// Bytes      n_active * n_cols * sizeof(T), all rows where dense
// Order      warps, then chunks, are added in their order by whichever block comes last (an integer ticket says which):
//            repeatable bit for bit

#include "common.cuh"

constexpr int DOWN_COLS = 256;
constexpr int DOWN_WARPS = 8;
constexpr int DOWN_ROWS_IN_FLIGHT = 8;
constexpr int LANE_COLS = DOWN_COLS / WARP;

struct DownArgs {
    const void* w_down_t;
    const float* h;
    float* x;
    float* partials;
    uint32_t* tickets;
    int32_t n_rows;
    int32_t n_cols;
    int32_t wide;   // rows are 16-byte aligned multiples of 16 bytes
    int32_t dense;  // reads every row
    int32_t n_rows_max;  // most rows of a chunk: sizes the shared arrays
};

// 8 neighbouring columns of one row.
template <typename T>
struct LaneRow {
    uint4 raw[sizeof(T) / 2];
};

template <typename T>
__device__ __forceinline__ LaneRow<T> load_lane_row(const T* row, int col, int n_cols) {
    LaneRow<T> out;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) {
        const int at = col + i * PER_LOAD<T>;
        out.raw[i] = at < n_cols ? load_weights(row + at) : make_uint4(0, 0, 0, 0);
    }
    return out;
}

template <typename T>
__device__ __forceinline__ void add_lane_row(const LaneRow<T>& row, float h, float (&sums)[LANE_COLS]) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) {
        float w[PER_LOAD<T>];
        unpack<T>(row.raw[i], w);
#pragma unroll
        for (int j = 0; j < PER_LOAD<T>; j++) {
            sums[i * PER_LOAD<T> + j] = fmaf(h, w[j], sums[i * PER_LOAD<T> + j]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void down(const DownArgs& a) {
    extern __shared__ float4 shared[];
    __shared__ int n_found[DOWN_WARPS];
    __shared__ float warp_sums[DOWN_WARPS][DOWN_COLS];
    __shared__ bool last;
    int* rows = reinterpret_cast<int*>(shared);
    float* values = reinterpret_cast<float*>(rows + a.n_rows_max);

    const int begin = share_begin(a.n_rows, blockIdx.y, gridDim.y);
    const int n_rows = share_begin(a.n_rows, blockIdx.y + 1, gridDim.y) - begin;
    const int col = blockIdx.x * DOWN_COLS + lane_id() * LANE_COLS;
    const T* w = static_cast<const T*>(a.w_down_t) + static_cast<int64_t>(begin) * a.n_cols;
    wait_for_previous();

    // Compaction in row order: each warp finds the rows of its share, then all append to one list.
    const int warp_begin = share_begin(n_rows, warp_id(), DOWN_WARPS);
    const int warp_end = share_begin(n_rows, warp_id() + 1, DOWN_WARPS);
    int n_mine = 0;
    for (int i = warp_begin + lane_id(); i - lane_id() < warp_end; i += WARP) {
        const float h = i < warp_end ? __ldcg(a.h + begin + i) : 0.0f;
        n_mine += __popc(__ballot_sync(0xffffffffu, i < warp_end && (a.dense || h != 0.0f)));
    }
    if (lane_id() == 0) {
        n_found[warp_id()] = n_mine;
    }
    __syncthreads();
    int n_before = 0;
    int n_listed = 0;
#pragma unroll
    for (int warp = 0; warp < DOWN_WARPS; warp++) {
        n_before += warp < warp_id() ? n_found[warp] : 0;
        n_listed += n_found[warp];
    }
    for (int i = warp_begin + lane_id(); i - lane_id() < warp_end; i += WARP) {
        const float h = i < warp_end ? __ldcg(a.h + begin + i) : 0.0f;
        const bool counts = i < warp_end && (a.dense || h != 0.0f);
        const uint32_t found = __ballot_sync(0xffffffffu, counts);
        if (counts) {
            const int at = n_before + __popc(found & ((1u << lane_id()) - 1));
            rows[at] = i;
            values[at] = h;
        }
        n_before += __popc(found);
    }
    __syncthreads();

    float sums[LANE_COLS] = {};
    if (a.wide) {
        for (int first = warp_id(); first < n_listed; first += DOWN_WARPS * DOWN_ROWS_IN_FLIGHT) {
            LaneRow<T> loaded[DOWN_ROWS_IN_FLIGHT];
#pragma unroll
            for (int k = 0; k < DOWN_ROWS_IN_FLIGHT; k++) {
                const int i = first + k * DOWN_WARPS;
                loaded[k] = load_lane_row(w + static_cast<int64_t>(i < n_listed ? rows[i] : 0) * a.n_cols,
                                          i < n_listed ? col : a.n_cols, a.n_cols);
            }
#pragma unroll
            for (int k = 0; k < DOWN_ROWS_IN_FLIGHT; k++) {
                const int i = first + k * DOWN_WARPS;
                add_lane_row(loaded[k], i < n_listed ? values[i] : 0.0f, sums);
            }
        }
    } else {
        for (int i = warp_id(); i < n_listed; i += DOWN_WARPS) {
            const T* row = w + static_cast<int64_t>(rows[i]) * a.n_cols;
#pragma unroll
            for (int j = 0; j < LANE_COLS; j++) {
                if (col + j < a.n_cols) {
                    sums[j] = fmaf(values[i], to_f32(row[col + j]), sums[j]);
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < LANE_COLS; j++) {
        warp_sums[warp_id()][lane_id() * LANE_COLS + j] = sums[j];
    }
    __syncthreads();

    // One thread for each column from here on.
    const int my_col = blockIdx.x * DOWN_COLS + threadIdx.x;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < DOWN_WARPS; warp++) {
        sum += warp_sums[warp][threadIdx.x];
    }
    if (gridDim.y > 1) {
        if (my_col < a.n_cols) {
            __stcg(a.partials + static_cast<int64_t>(blockIdx.y) * a.n_cols + my_col, sum);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(a.tickets + blockIdx.x, 1) == gridDim.y - 1;
        }
        __syncthreads();
        if (!last) {
            return;
        }
        __threadfence();
        sum = 0.0f;
        if (my_col < a.n_cols) {
#pragma unroll 8
            for (int chunk = 0; chunk < gridDim.y; chunk++) {
                sum += __ldcg(a.partials + static_cast<int64_t>(chunk) * a.n_cols + my_col);
            }
        }
        if (threadIdx.x == 0) {
            a.tickets[blockIdx.x] = 0;
        }
    }
    if (my_col < a.n_cols) {
        a.x[my_col] = __ldcg(a.x + my_col) + sum;
    }
}

extern "C" __global__ __launch_bounds__(256, 3) void down_f32(const __grid_constant__ DownArgs a) { down<float>(a); }
extern "C" __global__ __launch_bounds__(256, 3) void down_f16(const __grid_constant__ DownArgs a) { down<__half>(a); }
extern "C" __global__ __launch_bounds__(256, 3) void down_bf16(const __grid_constant__ DownArgs a) {
    down<__nv_bfloat16>(a);
}
