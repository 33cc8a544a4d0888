// token: the ends of a step, where a token becomes a vector and logits become a token.

#include "common.cuh"

// embed: x = w_embed[state.token] as f32.
// Shapes     w (vocab_size, n_cols) row-major; x (n_cols,) f32
// Grid       any; one element for each thread
struct EmbedArgs {
    const void* w;
    float* x;
    const State* state;
    int32_t n_rows;
    int32_t n_cols;
};

template <typename T>
__device__ __forceinline__ void embed(const EmbedArgs& a) {
    wait_for_previous();
    const int token = static_cast<int>(min(__ldcg(&a.state->token), static_cast<uint32_t>(a.n_rows - 1)));
    const T* row = static_cast<const T*>(a.w) + static_cast<int64_t>(token) * a.n_cols;
    for (int col = blockIdx.x * blockDim.x + threadIdx.x; col < a.n_cols; col += gridDim.x * blockDim.x) {
        a.x[col] = to_f32(row[col]);
    }
}

extern "C" __global__ __launch_bounds__(256) void embed_f32(const __grid_constant__ EmbedArgs a) { embed<float>(a); }
extern "C" __global__ __launch_bounds__(256) void embed_f16(const __grid_constant__ EmbedArgs a) { embed<__half>(a); }
extern "C" __global__ __launch_bounds__(256) void embed_bf16(const __grid_constant__ EmbedArgs a) {
    embed<__nv_bfloat16>(a);
}

// greedy: the id of the largest logit, the smallest id among equals, becomes the next token; position moves on.
// Shapes     logits (n,) f32; ids (n_ids,) u32: the token chosen at each position
// Grid       one block of 1024 threads
struct GreedyArgs {
    const float* logits;
    uint32_t* ids;
    State* state;
    int32_t n;
    int32_t n_ids;
};

extern "C" __global__ __launch_bounds__(1024) void greedy(const __grid_constant__ GreedyArgs a) {
    __shared__ float best_of[WARP];
    __shared__ int id_of[WARP];
    wait_for_previous();
    float best = -INFINITY;
    int id = 0;
    const auto offer = [&](float value, int at) {
        if (value > best || (value == best && at < id)) {
            best = value;
            id = at;
        }
    };
    const auto reduce = [&]() {
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const float value = __shfl_xor_sync(0xffffffffu, best, offset);
            const int at = __shfl_xor_sync(0xffffffffu, id, offset);
            offer(value, at);
        }
    };
#pragma unroll 8
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
        offer(__ldcg(a.logits + i), i);
    }
    reduce();
    if (lane_id() == 0) {
        best_of[warp_id()] = best;
        id_of[warp_id()] = id;
    }
    __syncthreads();
    if (warp_id() != 0) {
        return;
    }
    best = best_of[lane_id()];
    id = id_of[lane_id()];
    reduce();
    if (lane_id() == 0) {
        const uint32_t position = a.state->position;
        if (position < a.n_ids) {
            a.ids[position] = id;
        }
        a.state->token = id;
        a.state->position = position + 1;
    }
}

// set_state: the host says what comes next.
struct SetStateArgs {
    State* state;
    State next;
};

extern "C" __global__ void set_state(const __grid_constant__ SetStateArgs a) {
    wait_for_previous();
    *a.state = a.next;
}

// advance: position moves on; the host chooses the next token.
extern "C" __global__ void advance(State* state) {
    wait_for_previous();
    state->position += 1;
}

// read_all: reads memory once and does nothing else, to measure bandwidth; sum keeps the loads alive.
// Shapes     memory (n,) of 16 bytes; sum (1,) u32
// Grid       any; block 512 threads, 8 loads in flight for each
struct ReadAllArgs {
    const uint4* memory;
    uint32_t* sum;
    int64_t n;
};

extern "C" __global__ __launch_bounds__(512) void read_all(const __grid_constant__ ReadAllArgs a) {
    uint32_t sum = 0;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 7 * stride < a.n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            v[k] = load_weights(a.memory + i + k * stride);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
        }
    }
    uint4 v[7];
#pragma unroll
    for (int k = 0; k < 7; k++) {
        v[k] = i + k * stride < a.n ? load_weights(a.memory + i + k * stride) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int k = 0; k < 7; k++) {
        sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x5eed5eed) {
        *a.sum = sum;
    }
}
