// audit: what the MLPs of a token missed among drawn rows, all layers in one launch.
//
// Computes   energy(i, h) = h^2 norms[i], in f64; over the rows i of the sample that the token left out
//              h(i) = act(w_gate[i] . x) * (w_up[i] . x)
//              missed_energy = sum energy(i, h(i)); n_skipped = how many there are; n_missed = those that are active
//            over all rows kept_energy = sum energy(i, h[i]) with the h of the token, 0 where a row was left out
// Source     Horvitz and Thompson, JASA 1952: what is drawn at random stands for the rest (runtime, audit.rs)
// Reference  reference::audit; counts equal, energies within TOLERANCE (sum order)
// Shapes     x (n_layers, n_cols) f32; h, norms (n_layers, n_rows) f32; skip (n_layers, n_rows) u8; sample
//            (n_layers, n_drawn) u32, where what is no row stands for none; w_gate, w_up (n_rows, n_cols) row-major, null
//            for a layer that is left alone; records (n_layers, gridDim.x)
// Needs      any n_cols (16-byte loads where rows are multiples of 16 bytes); checked in cuda::audit
// Grid       (blocks of a layer, layers): of all layers together two for each SM, so that all run at once
// Block      512 threads; shared memory: x by slot; of the block's part of the sample h, rows, the queues of rows left out
//            and of active ones, and one float for each segment of a row
// Warp       one segment of one queued row at a time
// Bytes      (n_skipped + n_missed) * n_cols * sizeof(T); a row of W_down is not read, as its norm is at hand
// Order      rows enter a queue in the order in which threads find them, which moves work between warps, never a sum: a
//            thread adds the energies of its own places of the sample and of its own rows, blocks add in a fixed tree, the
//            host adds blocks in order. Integer atomics alone: repeatable bit for bit

#include "dot.cuh"

// Layers of a launch.
constexpr int AUDIT_LAYERS = 128;

struct AuditRecord {
    double missed_energy;
    double kept_energy;
    uint32_t n_skipped;
    uint32_t n_missed;
};

struct AuditLayer {
    const void* w_gate;
    const void* w_up;
};

struct AuditArgs {
    RowCut cut;
    const float* x;
    const float* h;
    const uint8_t* skip;
    const float* norms;
    const uint32_t* sample;
    AuditRecord* records;
    int32_t n_rows;
    int32_t n_drawn;
    int32_t n_part_max;  // most drawn rows of a block: sizes the shared arrays
    uint32_t activation;
    float threshold;
    AuditLayer layers[AUDIT_LAYERS];
};

__device__ __forceinline__ double energy(float h, float norm) {
    // A row that adds nothing does so with a norm that is no number, too.
    return h == 0.0f ? 0.0 : static_cast<double>(h) * h * norm;
}

template <typename T>
__device__ __forceinline__ void audit(const AuditArgs& a) {
    extern __shared__ float4 shared[];
    __shared__ double scratch[2][WARP];
    __shared__ int n_skipped;
    __shared__ int n_missed;
    float* slots = reinterpret_cast<float*>(shared);
    float* drawn_h = slots + n_slots<T>(a.cut);
    int* rows = reinterpret_cast<int*>(drawn_h + a.n_part_max);
    int* skipped = rows + a.n_part_max;
    int* active = skipped + a.n_part_max;
    float* partials = reinterpret_cast<float*>(active + a.n_part_max);

    const int64_t layer = blockIdx.y;
    const AuditLayer& w = a.layers[layer];
    if (w.w_gate == nullptr) {
        return;
    }
    const float* h = a.h + layer * a.n_rows;
    const uint8_t* skip = a.skip + layer * a.n_rows;
    const float* norms = a.norms + layer * a.n_rows;
    const int begin = share_begin(a.n_drawn, blockIdx.x, gridDim.x);
    const int n = share_begin(a.n_drawn, blockIdx.x + 1, gridDim.x) - begin;
    const uint32_t* sample = a.sample + layer * a.n_drawn + begin;
    const auto row_of = [&](const void* matrix, int place) {
        return static_cast<const T*>(matrix) + static_cast<int64_t>(rows[place]) * a.cut.n_cols;
    };

    if (threadIdx.x == 0) {
        n_skipped = 0;
        n_missed = 0;
    }
    __syncthreads();
    wait_for_previous();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const uint32_t row = sample[i];
        rows[i] = row;
        drawn_h[i] = 0.0f;
        if (row < static_cast<uint32_t>(a.n_rows) && skip[row] != 0) {
            skipped[atomicAdd(&n_skipped, 1)] = i;
        }
    }
    load_vector<T>(a.cut, a.x + layer * a.cut.n_cols, slots);
    double kept = 0.0;
    const int end = share_begin(a.n_rows, blockIdx.x + 1, gridDim.x);
    for (int row = share_begin(a.n_rows, blockIdx.x, gridDim.x) + threadIdx.x; row < end; row += blockDim.x) {
        kept += energy(h[row], norms[row]);
    }
    __syncthreads();

    dot_items<T>(a.cut, n_skipped, slots, partials, [&](int i) { return row_of(w.w_gate, skipped[i]); });
    __syncthreads();
    for (int i = threadIdx.x; i < n_skipped; i += blockDim.x) {
        const float gate = activate(a.activation, a.threshold, row_total(a.cut, partials, i));
        if (gate != 0.0f) {
            drawn_h[skipped[i]] = gate;
            active[atomicAdd(&n_missed, 1)] = skipped[i];
        }
    }
    __syncthreads();
    dot_items<T>(a.cut, n_missed, slots, partials, [&](int i) { return row_of(w.w_up, active[i]); });
    __syncthreads();
    for (int i = threadIdx.x; i < n_missed; i += blockDim.x) {
        drawn_h[active[i]] *= row_total(a.cut, partials, i);
    }
    __syncthreads();

    double missed = 0.0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        if (drawn_h[i] != 0.0f) {
            missed += energy(drawn_h[i], norms[rows[i]]);
        }
    }
    missed = block_sum(missed, scratch[0]);
    kept = block_sum(kept, scratch[1]);
    if (threadIdx.x == 0) {
        a.records[layer * gridDim.x + blockIdx.x] =
            {missed, kept, static_cast<uint32_t>(n_skipped), static_cast<uint32_t>(n_missed)};
    }
}

extern "C" __global__ __launch_bounds__(512, 2) void audit_f32(const __grid_constant__ AuditArgs a) {
    audit<float>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void audit_f16(const __grid_constant__ AuditArgs a) {
    audit<__half>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void audit_bf16(const __grid_constant__ AuditArgs a) {
    audit<__nv_bfloat16>(a);
}

// squared_norms: norms[i] = |w[i]|^2 of the rows of w (n_rows, n_cols), once for each matrix; norms (n_rows,) f32. A warp
// for each row.
struct SquaredNormsArgs {
    const void* w;
    float* norms;
    int32_t n_rows;
    int32_t n_cols;
    int32_t wide;  // rows are 16-byte aligned multiples of 16 bytes
};

template <typename T>
__device__ __forceinline__ void squared_norms(const SquaredNormsArgs& a) {
    wait_for_previous();
    const int n_warps = blockDim.x / WARP;
    for (int row = blockIdx.x * n_warps + warp_id(); row < a.n_rows; row += gridDim.x * n_warps) {
        const T* w = static_cast<const T*>(a.w) + static_cast<int64_t>(row) * a.n_cols;
        float sum = 0.0f;
        if (a.wide) {
#pragma unroll 4
            for (int col = lane_id() * PER_LOAD<T>; col < a.n_cols; col += WARP * PER_LOAD<T>) {
                float v[PER_LOAD<T>];
                unpack<T>(load_weights(w + col), v);
#pragma unroll
                for (int i = 0; i < PER_LOAD<T>; i++) {
                    sum = fmaf(v[i], v[i], sum);
                }
            }
        } else {
            for (int col = lane_id(); col < a.n_cols; col += WARP) {
                const float v = to_f32(w[col]);
                sum = fmaf(v, v, sum);
            }
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) {
            a.norms[row] = sum;
        }
    }
}

extern "C" __global__ __launch_bounds__(512, 2) void squared_norms_f32(const __grid_constant__ SquaredNormsArgs a) {
    squared_norms<float>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void squared_norms_f16(const __grid_constant__ SquaredNormsArgs a) {
    squared_norms<__half>(a);
}
extern "C" __global__ __launch_bounds__(512, 2) void squared_norms_bf16(const __grid_constant__ SquaredNormsArgs a) {
    squared_norms<__nv_bfloat16>(a);
}
