// Dot products of rows with one vector: the vector lies in shared memory as f32, warps take items in turn.
//
// A warp's loop keeps one item's loads in flight while it reduces the one before, and asks L2 for the items it will
// come to later, so that memory stays busy across a kernel's start.

#pragma once

#include "common.cuh"

// How rows of n_cols elements are cut into segments. Made by the host (launch.rs, RowCut), the same for all rows.
struct RowCut {
    int32_t n_cols;
    int32_t n_segs;     // segments in a row
    int32_t seg_loads;  // loads of each lane in a segment, at most SEG_LOADS
    int32_t wide;       // rows are 16-byte aligned multiples of 16 bytes
    int32_t n_ahead;    // items that a warp asks L2 for ahead of its loads
};

// Columns in a segment.
template <typename T>
__device__ __forceinline__ int seg_cols(const RowCut& cut) {
    return cut.seg_loads * WARP * PER_LOAD<T>;
}

// Slots of the vector in shared memory: whole segments, zeros past the last column.
template <typename T>
__device__ __forceinline__ int n_slots(const RowCut& cut) {
    return cut.n_segs * seg_cols<T>(cut);
}

// Slot of a column. A lane multiplies PER_LOAD neighbours at a time, read as float4: with eight of them, the first and
// the second four live in separate planes, so that the lanes of a quarter warp hit different banks.
template <typename T>
__device__ __forceinline__ int slot(int col, int plane) {
    if constexpr (PER_LOAD<T> == 8) {
        return (col % 8 / 4) * plane + col / 8 * 4 + col % 4;
    } else {
        return col;
    }
}

template <typename T>
__device__ __forceinline__ void load_item(const RowCut& cut, const T* row, int seg, uint4 (&raw)[SEG_LOADS]) {
    const int first = seg * seg_cols<T>(cut) + lane_id() * PER_LOAD<T>;
#pragma unroll
    for (int k = 0; k < SEG_LOADS; k++) {
        const int col = first + k * WARP * PER_LOAD<T>;
        raw[k] = make_uint4(0, 0, 0, 0);
        if (k < cut.seg_loads && col < cut.n_cols) {
            raw[k] = load_weights(row + col);
        }
    }
}

// This lane's part of the item's dot product.
template <typename T>
__device__ __forceinline__ float multiply_item(
    const RowCut& cut, int seg, const uint4 (&raw)[SEG_LOADS], const float* x
) {
    const int plane = n_slots<T>(cut) / 2;
    const int first = seg * seg_cols<T>(cut) + lane_id() * PER_LOAD<T>;
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < SEG_LOADS; k++) {
        if (k >= cut.seg_loads) {
            break;
        }
        const int at = slot<T>(first + k * WARP * PER_LOAD<T>, plane);
        float w[PER_LOAD<T>];
        unpack<T>(raw[k], w);
#pragma unroll
        for (int half = 0; half < PER_LOAD<T> / 4; half++) {
            const float4 v = *reinterpret_cast<const float4*>(x + at + half * plane);
            sums[0] = fmaf(w[4 * half], v.x, sums[0]);
            sums[1] = fmaf(w[4 * half + 1], v.y, sums[1]);
            sums[2] = fmaf(w[4 * half + 2], v.z, sums[2]);
            sums[3] = fmaf(w[4 * half + 3], v.w, sums[3]);
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same, element by element, for rows whose width or address does not allow 16-byte loads.
template <typename T>
__device__ __noinline__ float multiply_item_any(const RowCut& cut, int seg, const T* row, const float* x) {
    const int plane = n_slots<T>(cut) / 2;
    const int begin = seg * seg_cols<T>(cut);
    const int end = min(begin + seg_cols<T>(cut), cut.n_cols);
    float sum = 0.0f;
    for (int col = begin + lane_id(); col < end; col += WARP) {
        sum = fmaf(to_f32(row[col]), x[slot<T>(col, plane)], sum);
    }
    return sum;
}

// Asks L2 for an item.
template <typename T>
__device__ __forceinline__ void prefetch_item(const RowCut& cut, const T* row, int seg) {
    if (lane_id() == 0 && cut.wide) {
        const int begin = seg * seg_cols<T>(cut);
        const int end = min(begin + seg_cols<T>(cut), cut.n_cols);
        prefetch_l2(row + begin, (end - begin) * sizeof(T));
    }
}

// Asks L2 for the items that this warp begins with. row_of(i) is the address of the i-th row of the block.
template <typename T, typename RowOf>
__device__ __forceinline__ void prefetch_first_items(const RowCut& cut, int n_rows, RowOf row_of) {
    const int n_warps = blockDim.x / WARP;
    const int n_items = n_rows * cut.n_segs;
    for (int k = 0; k < cut.n_ahead; k++) {
        const int item = warp_id() + k * n_warps;
        if (item < n_items) {
            prefetch_item(cut, row_of(item / cut.n_segs), item % cut.n_segs);
        }
    }
}

// partials[i * n_segs + seg] = segment seg of row i of the block with x. Needs a barrier before partials are read.
template <typename T, typename RowOf>
__device__ __forceinline__ void dot_items(
    const RowCut& cut, int n_rows, const float* x, float* partials, RowOf row_of
) {
    const int n_warps = blockDim.x / WARP;
    const int n_items = n_rows * cut.n_segs;
    int item = warp_id();
    if (item >= n_items) {
        return;
    }
    if (!cut.wide) {
        for (; item < n_items; item += n_warps) {
            const int i = item / cut.n_segs;
            const float sum = warp_sum(multiply_item_any(cut, item - i * cut.n_segs, row_of(i), x));
            if (lane_id() == 0) {
                partials[item] = sum;
            }
        }
        return;
    }
    uint4 raw[SEG_LOADS];
    int seg = item % cut.n_segs;
    load_item(cut, row_of(item / cut.n_segs), seg, raw);
    while (true) {
        const float sum = multiply_item<T>(cut, seg, raw, x);
        const int done = item;
        item += n_warps;
        if (item < n_items) {
            const int i = item / cut.n_segs;
            seg = item - i * cut.n_segs;
            load_item(cut, row_of(i), seg, raw);
            const int later = item + cut.n_ahead * n_warps;
            if (cut.n_ahead > 0 && later < n_items) {
                const int j = later / cut.n_segs;
                prefetch_item(cut, row_of(j), later - j * cut.n_segs);
            }
        }
        const float total = warp_sum(sum);
        if (lane_id() == 0) {
            partials[done] = total;
        }
        if (item >= n_items) {
            return;
        }
    }
}

// The dot product of row i: its segments in order.
__device__ __forceinline__ float row_total(const RowCut& cut, const float* partials, int i) {
    float total = 0.0f;
    for (int seg = 0; seg < cut.n_segs; seg++) {
        total += partials[i * cut.n_segs + seg];
    }
    return total;
}

// x into its slots, as it is. Needs a barrier before it is read.
template <typename T>
__device__ __forceinline__ void load_vector(const RowCut& cut, const float* x, float* slots) {
    const int n = n_slots<T>(cut);
    for (int col = threadIdx.x; col < n; col += blockDim.x) {
        slots[slot<T>(col, n / 2)] = col < cut.n_cols ? __ldcg(x + col) : 0.0f;
    }
}

// RMSNorm(x) into its slots and, with signs, its sign words: bit c % 32 of word c / 32 is 1 iff element c is below
// zero. scratch: one float for each warp. Needs a barrier before slots or signs are read.
template <typename T>
__device__ __forceinline__ void load_normalised(
    const RowCut& cut, const float* x, const float* weight, float eps, float* slots, uint32_t* signs, float* scratch
) {
    const int n = n_slots<T>(cut);
    float square = 0.0f;
#pragma unroll 8
    for (int col = threadIdx.x; col < n; col += blockDim.x) {
        const float v = col < cut.n_cols ? __ldcg(x + col) : 0.0f;
        slots[slot<T>(col, n / 2)] = v;
        square = fmaf(v, v, square);
    }
    const float scale = rsqrtf(block_sum(square, scratch) / cut.n_cols + eps);
    // Each thread rewrites its own slots; a warp holds 32 neighbours, one sign word.
#pragma unroll 4
    for (int col = threadIdx.x; col < n; col += blockDim.x) {
        float v = 0.0f;
        if (col < cut.n_cols) {
            float& at = slots[slot<T>(col, n / 2)];
            v = at * scale * __ldg(weight + col);
            at = v;
        }
        if (signs != nullptr) {
            const uint32_t word = __ballot_sync(0xffffffffu, v < 0.0f);
            if (lane_id() == 0 && col < cut.n_cols) {
                signs[col / WARP] = word;
            }
        }
    }
}

// Asks L2 for a norm's weights; every block needs all of them.
__device__ __forceinline__ void prefetch_norm(const float* weight, int n_cols) {
    if (threadIdx.x == 0 && n_cols % 4 == 0) {
        prefetch_l2(weight, n_cols * sizeof(float));
    }
}
