// prefill_gemm_wide: products of many tokens with a matrix on Hopper, where cuBLASLt is not at hand.
//
// Computes   as prefill_gemm
// Source     wgmma and the tensor memory accelerator as in CUTLASS's sm90 kernels (NVIDIA); written anew
// Reference  reference::{matmul, matmul_t} over rounded x; within TOLERANCE (sum order)
// Shapes     x (PLANES * n_tokens, n_in), w (n_out, n_in) or as _t (n_in, n_out), each behind a tensor map made in
//            gemm.rs: boxes of 64 columns (128 bytes, swizzled), zeros outside; y (n_tokens, n_out) f32
// Needs      sm_90a; rows of x and w multiples of 16 bytes, both 16-byte aligned; checked in gemm.rs
// Grid       (ceil(n_tokens / 256) * 2, ceil(n_out / OUTS)); clusters of two blocks that need the same weights: each
//            loads half of them for both, as the reading of L2 is what bounds this kernel
// Block      288 threads over a tile of 128 x OUTS; shared memory: STAGES tiles of 64 columns on their way
// Warp       the first eight, two groups of four, multiply 64 tokens each; the last one starts the copies
// Bytes      weights once for each 256 tokens, x once for each OUTS outputs, mostly from L2
// Order      each sum in one fixed order, no atomics: repeatable bit for bit
// Measured   H100, 512 tokens of 7B f16: 404 to 563 TFLOP/s (cuBLASLt 577 to 687); record 2026-11-25-h100-prompt
// Tried      barriers at the scope of the cluster: a third of the speed

#include "bulk.cuh"
#include "prefill.cuh"

// Hopper's own instructions exist in the code for sm_90a alone; gemm.rs asks the module for the kernels.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct TensorMap {
    alignas(64) uint64_t opaque[16];
};

struct PrefillGemmWideArgs {
    TensorMap x;
    TensorMap w;
    float* y;
    int32_t n_tokens;
    int32_t n_in;
    int32_t n_out;
    int32_t accumulate;
};

constexpr int WIDE_TOKENS = 128;
constexpr int WIDE_DEPTH = 64;
constexpr int WIDE_CLUSTER = 2;
constexpr int WIDE_THREADS = 9 * WARP;
// Outputs of one wgmma.
constexpr int WIDE_MMA_OUTS = 128;
// Bytes of one column box of a tile: a row of 64 16-bit elements.
constexpr int WIDE_ROW_BYTES = 2 * WIDE_DEPTH;

template <int OUTS>
struct WideStage {
    alignas(1024) uint8_t x[WIDE_TOKENS * WIDE_ROW_BYTES];
    uint8_t w[OUTS * WIDE_ROW_BYTES];
};

template <int OUTS, int STAGES>
struct WideShared {
    WideStage<OUTS> stages[STAGES];
    // A stage is full once its bytes have arrived, empty once both blocks of the cluster have multiplied it.
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
};

// Arrives at the barrier of block rank of the cluster. Neither this nor the wait orders memory beyond the block: what
// crosses blocks is written by the copies and read by the products, and the barriers order those. At the cluster's
// scope each would wait for all memory accesses, which costs more than a stage's products.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The box of map from (col, row) on into this block's shared memory, and that of the other blocks in mask.
__device__ __forceinline__ void copy_box(
    void* to, const TensorMap* map, int col, int row, uint64_t* barrier, uint16_t mask
) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"(mask)
        : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int col, int row, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// Where wgmma finds a matrix: swizzled rows of 128 bytes, eight of them 1024 bytes from the next eight; columns of more
// than 128 bytes lead_bytes from each other.
__device__ __forceinline__ uint64_t describe(const void* matrix, uint32_t lead_bytes) {
    constexpr uint64_t SWIZZLE_128B = 1;
    return (shared_address(matrix) & 0x3ffff) >> 4 | static_cast<uint64_t>(lead_bytes >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | SWIZZLE_128B << 62;
}

// c (64 x 128) += a (64 x 16) b (16 x 128) of a group of four warps, f32 sums. c[4 n..] of a lane are its part of the
// 16 x 8 matrix n of its warp, as multiply_matrices has it.
#define WIDE_MULTIPLY(TYPE)                                                                                       \
    asm volatile(                                                                                                 \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                              \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "    \
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "    \
        "%62, %63}, %64, %65, 1, 1, 1, 0, %66;"                                                                   \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),         \
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),   \
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]),              \
          "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),              \
          "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]),              \
          "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]),              \
          "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]),              \
          "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]),              \
          "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])                            \
        : "l"(a), "l"(b), "n"(B_TRANSPOSED))

template <typename T, int B_TRANSPOSED>
__device__ __forceinline__ void multiply_wide(float (&c)[64], uint64_t a, uint64_t b) {
    if constexpr (PLANES<T> == 1) {
        WIDE_MULTIPLY("f16");
    } else {
        WIDE_MULTIPLY("bf16");
    }
}

// Waits until at most N of the committed groups of products are under way.
template <int N>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The warp that copies: stage after stage of x for this block and a half of w for both.
template <typename T, int OUTS, int STAGES, bool TRANSPOSED>
__device__ __forceinline__ void load_wide(
    const PrefillGemmWideArgs& a, WideShared<OUTS, STAGES>& shared, int first_token, int first_out, int n_steps
) {
    constexpr uint16_t BOTH = 0b11;
    constexpr int HALF = OUTS / WIDE_CLUSTER;
    const uint32_t rank = cluster_rank();
    for (int turn = 0; turn < n_steps * PLANES<T>; turn++) {
        const int at = turn % STAGES;
        WideStage<OUTS>& stage = shared.stages[at];
        uint64_t* full = &shared.full[at];
        wait_at(&shared.empty[at], (turn / STAGES & 1) ^ 1);
        expect_bytes(full, (WIDE_TOKENS + OUTS) * WIDE_ROW_BYTES);
        const int first_in = turn % n_steps * WIDE_DEPTH;
        copy_box(stage.x, &a.x, first_in, turn / n_steps * a.n_tokens + first_token, full);
        if constexpr (TRANSPOSED) {
            // Boxes of 64 outputs, one after the other.
#pragma unroll
            for (int out = 0; out < HALF; out += WIDE_DEPTH) {
                const int from = rank * HALF + out;
                copy_box(stage.w + from * WIDE_ROW_BYTES, &a.w, first_out + from, first_in, full, BOTH);
            }
        } else {
            const int from = rank * HALF;
            copy_box(stage.w + from * WIDE_ROW_BYTES, &a.w, first_in, first_out + from, full, BOTH);
        }
    }
}

template <typename T, int OUTS, int STAGES, bool TRANSPOSED>
__device__ __forceinline__ void multiply_stages(
    const PrefillGemmWideArgs& a, WideShared<OUTS, STAGES>& shared, int first_token, int first_out, int n_steps
) {
    const int group = warp_id() / 4;
    const bool is_first = threadIdx.x % (4 * WARP) == 0;
    const auto release = [&](int turn) {
        if (is_first) {
#pragma unroll
            for (int rank = 0; rank < WIDE_CLUSTER; rank++) {
                arrive_at(&shared.empty[turn % STAGES], rank);
            }
        }
    };
    float sums[OUTS / WIDE_MMA_OUTS][64] = {};
    const int n_turns = n_steps * PLANES<T>;
    for (int turn = 0; turn < n_turns; turn++) {
        const WideStage<OUTS>& stage = shared.stages[turn % STAGES];
        wait_at(&shared.full[turn % STAGES], turn / STAGES & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int depth = 0; depth < WIDE_DEPTH; depth += 16) {
            const uint64_t x = describe(stage.x + group * 64 * WIDE_ROW_BYTES + depth * 2, 0);
#pragma unroll
            for (int n = 0; n < OUTS / WIDE_MMA_OUTS; n++) {
                const uint8_t* w = stage.w + n * WIDE_MMA_OUTS * WIDE_ROW_BYTES;
                if constexpr (TRANSPOSED) {
                    // Rows are inputs here, and the second 64 outputs a box further.
                    const uint64_t b = describe(w + depth * WIDE_ROW_BYTES, WIDE_DEPTH * WIDE_ROW_BYTES);
                    multiply_wide<T, 1>(sums[n], x, b);
                } else {
                    multiply_wide<T, 0>(sums[n], x, describe(w + depth * 2, 0));
                }
            }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // While this turn's products run, the stage of the turn before is given back.
        wait_products<1>();
        if (turn > 0) {
            release(turn - 1);
        }
    }
    wait_products<0>();

    PrefillGemmArgs out = {};
    out.y = a.y;
    out.n_tokens = a.n_tokens;
    out.n_out = a.n_out;
    out.accumulate = a.accumulate;
    const int token = first_token + warp_id() * 16 + lane_id() / 4;
#pragma unroll
    for (int n = 0; n < OUTS / WIDE_MMA_OUTS; n++) {
#pragma unroll
        for (int i = 0; i < WIDE_MMA_OUTS / 8; i++) {
            const float(&c)[64] = sums[n];
            const int at = first_out + n * WIDE_MMA_OUTS + i * 8 + lane_id() % 4 * 2;
            store_products(out, token, at, c[4 * i], c[4 * i + 1]);
            store_products(out, token + 8, at, c[4 * i + 2], c[4 * i + 3]);
        }
    }
}

template <typename T, int OUTS, int STAGES, bool TRANSPOSED>
__device__ __forceinline__ void prefill_gemm_wide(const PrefillGemmWideArgs& a) {
    extern __shared__ __align__(1024) uint8_t wide_shared[];
    auto& shared = *reinterpret_cast<WideShared<OUTS, STAGES>*>(wide_shared);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(&shared.full[stage], 1);
            init_barrier(&shared.empty[stage], 2 * WIDE_CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    sync_cluster();
    wait_for_previous();

    const int first_token = blockIdx.x * WIDE_TOKENS;
    const int first_out = blockIdx.y * OUTS;
    const int n_steps = (a.n_in + WIDE_DEPTH - 1) / WIDE_DEPTH;
    if (warp_id() < 8) {
        multiply_stages<T, OUTS, STAGES, TRANSPOSED>(a, shared, first_token, first_out, n_steps);
    } else if (lane_id() == 0) {
        load_wide<T, OUTS, STAGES, TRANSPOSED>(a, shared, first_token, first_out, n_steps);
    }
    // A block stays until nobody copies to it or arrives at its barriers any more.
    __syncwarp();
    sync_cluster();
}

#define PREFILL_GEMM_WIDE(NAME, T, OUTS, STAGES, TRANSPOSED)                                                          \
    extern "C" __global__ __cluster_dims__(WIDE_CLUSTER, 1, 1) __launch_bounds__(WIDE_THREADS, 1) void prefill_gemm_##NAME( \
        const __grid_constant__ PrefillGemmWideArgs a                                                                 \
    ) {                                                                                                               \
        prefill_gemm_wide<T, OUTS, STAGES, TRANSPOSED>(a);                                                            \
    }

PREFILL_GEMM_WIDE(f16_wide128, __half, 128, 6, false)
PREFILL_GEMM_WIDE(f16_wide128_t, __half, 128, 6, true)
PREFILL_GEMM_WIDE(f16_wide256, __half, 256, 4, false)
PREFILL_GEMM_WIDE(f16_wide256_t, __half, 256, 4, true)
PREFILL_GEMM_WIDE(bf16_wide128, __nv_bfloat16, 128, 6, false)
PREFILL_GEMM_WIDE(bf16_wide128_t, __nv_bfloat16, 128, 6, true)
PREFILL_GEMM_WIDE(bf16_wide256, __nv_bfloat16, 256, 4, false)
PREFILL_GEMM_WIDE(bf16_wide256_t, __nv_bfloat16, 256, 4, true)

#endif
