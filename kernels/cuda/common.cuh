// What every kernel shares: element types, wide loads, reductions, and the overlap of one kernel with the next.
//
// Words: a lane is a thread of a warp; a segment is the part of a row that one warp multiplies at a time, SEG_LOADS
// 16-byte loads for each lane at most; an item is one segment of one row.

#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int WARP = 32;
// 16-byte loads that a lane has in flight. Eight, for 16 warps a block, are 64 KB on an SM: three times what the
// latency of an H100's memory asks for.
constexpr int SEG_LOADS = 8;

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

// Overlap with the kernels before and after in the stream (programmatic dependent launch, sm_90 and later). What
// comes before wait_for_writes() touches weights alone; every vector that another kernel wrote is read after it.
// Mostly the next kernel is let in right after the wait: it then waits in turn, having asked for its first weights.
__device__ __forceinline__ void wait_for_writes() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
    wait_for_writes();
    let_next_start();
}

// Asks for bytes ahead of their use. address and n_bytes are multiples of 16. One lane is enough.
__device__ __forceinline__ void prefetch_l2(const void* address, uint32_t n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(n_bytes) : "memory");
#endif
}

// 16 bytes of weights: read once, so they do not displace what L1 holds.
__device__ __forceinline__ uint4 load_weights(const void* address) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
}

__device__ __forceinline__ uint32_t shared_address(const void* address) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// 16 bytes from global to shared memory without a register in between; zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool in) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(in ? 16 : 0)
                 : "memory");
}

// Makes a group of the asynchronous copies started since the last one, for waits to count.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of the committed groups are still on their way.
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Elements in 16 bytes.
template <typename T>
constexpr int PER_LOAD = 16 / sizeof(T);

__device__ __forceinline__ float to_f32(float v) { return v; }
__device__ __forceinline__ float to_f32(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void from_f32(float v, float& out) { out = v; }
__device__ __forceinline__ void from_f32(float v, __half& out) { out = __float2half_rn(v); }

// The elements of 16 bytes as f32, exact.
template <typename T>
__device__ __forceinline__ void unpack(uint4 raw, float (&out)[PER_LOAD<T>]);

template <>
__device__ __forceinline__ void unpack<float>(uint4 raw, float (&out)[4]) {
    out[0] = __uint_as_float(raw.x);
    out[1] = __uint_as_float(raw.y);
    out[2] = __uint_as_float(raw.z);
    out[3] = __uint_as_float(raw.w);
}

template <>
__device__ __forceinline__ void unpack<__half>(uint4 raw, float (&out)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(uint4 raw, float (&out)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

template <typename T>
__device__ __forceinline__ float2 pair_of(uint32_t bits);
template <>
__device__ __forceinline__ float2 pair_of<__half>(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
template <>
__device__ __forceinline__ float2 pair_of<__nv_bfloat16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// Four neighbouring weights.
__device__ __forceinline__ float4 four_of(const float* w) { return *reinterpret_cast<const float4*>(w); }
template <typename T>
__device__ __forceinline__ float4 four_of(const T* w) {
    const uint2 raw = *reinterpret_cast<const uint2*>(w);
    const float2 low = pair_of<T>(raw.x);
    const float2 high = pair_of<T>(raw.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

// Bits of 16 bytes that differ.
__device__ __forceinline__ uint32_t n_differ(uint4 a, uint4 b) {
    return __popc(a.x ^ b.x) + __popc(a.y ^ b.y) + __popc(a.z ^ b.z) + __popc(a.w ^ b.w);
}

// The same value on every lane: lanes add in a fixed tree.
template <typename V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, offset);
    }
    return v;
}

// The threads of a block that work together, whole warps from the first on: all of them.
struct WholeBlock {
    __device__ __forceinline__ static int n_threads() { return blockDim.x; }
    __device__ __forceinline__ static void sync() { __syncthreads(); }
};

// The sum over the threads of Team on every one, in a fixed order. scratch holds one value for each warp. Ends past a
// barrier; scratch is free again after the next one.
template <typename Team = WholeBlock, typename V>
__device__ __forceinline__ V block_sum(V v, V* scratch) {
    v = warp_sum(v);
    if (lane_id() == 0) {
        scratch[warp_id()] = v;
    }
    Team::sync();
    const int n_warps = Team::n_threads() / WARP;
    return warp_sum(lane_id() < n_warps ? scratch[lane_id()] : V{});
}

// Rows that are read, as the host numbers them.
enum Rows : uint32_t { ALL = 0, ACTIVE = 1, PREDICTED = 2 };

// The limit of row i: its own, or the one of all rows.
__device__ __forceinline__ uint32_t limit_of(const uint32_t* limits, uint32_t limit, int i) {
    return limits == nullptr ? limit : __ldg(limits + i);
}

// Activations, as the host numbers them.
enum Activation : uint32_t { RELU = 0, FATRELU = 1, SILU = 2 };

__device__ __forceinline__ float activate(uint32_t activation, float threshold, float v) {
    switch (activation) {
        case RELU:
            return fmaxf(v, 0.0f);
        case FATRELU:
            return v >= threshold ? v : 0.0f;
        default:
            return v / __fadd_rn(1.0f, expf(-v));
    }
}

// Factor that brings sums relative to maximum up to those relative to the larger one.
__device__ __forceinline__ float rescale(float maximum, float larger) {
    return maximum == -INFINITY ? 0.0f : exp2f(maximum - larger);
}

// First of the units that block gets when n_units are dealt to n_blocks in contiguous runs, the first ones one longer.
__device__ __forceinline__ int share_begin(int n_units, int block, int n_blocks) {
    const int each = static_cast<unsigned>(n_units) / static_cast<unsigned>(n_blocks);
    return block * each + min(block, n_units - each * n_blocks);
}

// Where a token stands; written by the last kernel of a token, read by all of the next.
struct State {
    uint32_t token;     // the token being processed
    uint32_t position;  // its position, also the number of positions before it
};
