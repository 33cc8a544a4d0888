// A vector in shared memory that rows of weights, also there, are multiplied with.
//
// Computes   sum_c row[c] x[c] for PRODUCT_ROWS rows at a time, each warp for its own chunks of columns
// Source     PTX mma.m16n8k16: tensor cores add in f32, and only x has more bits than they take
// Reference  reference::matvec; within TOLERANCE (sum order)
// Shapes     x as terms, each of all columns in the type of the weights: the value nearest to x, the value nearest to
//            what is left, and once more; f32 has one term. Past the last column zeros, to whole chunks
// Scale      f16 holds x times a power of two, one for each warp's columns, that brings the largest below 2^15: what
//            three terms leave is below 2^-39 of it, and nothing where an f32 is above 2^-15 of it
// Warp       chunk c of CHUNK_COLS columns is warp c % N_WARPS'. Eight weight rows are the right side of a product, the
//            terms rows of its left side. A lane reads 16 bytes of its weight row at a time, for two products: rows 0 to 7
//            of the left side belong to the first and 8 to 15 to the second, so that 16 bytes of a term, its middle pairs
//            exchanged, are the left side of both. So that eight lanes meet all banks, odd weight rows take the two halves
//            of a line in the other order, and rows 4 to 7 and 12 to 15 hold the terms in that order
// Order      fixed by the shapes: repeatable bit for bit

#pragma once

#include "matrix.cuh"

// Rows of a product.
constexpr int PRODUCT_ROWS = 8;
constexpr int CHUNK_COLS = 128;
// Bytes of a chunk of 16-bit weights, in two lines.
constexpr int CHUNK_BYTES = 2 * CHUNK_COLS;
constexpr int LINE_BYTES = CHUNK_BYTES / 2;
// Loads of a lane for a chunk of eight rows.
constexpr int CHUNK_LOADS = 4;
// Chunks of a warp that registers have room for beside a norm: of rows of 5120 columns, for eight warps.
constexpr int HELD_CHUNKS = 5;

__host__ __device__ constexpr int n_vector_chunks(int n_cols) { return (n_cols + CHUNK_COLS - 1) / CHUNK_COLS; }

template <typename T>
constexpr int N_TERMS = sizeof(T) == 2 ? 3 : 1;

// Two neighbouring terms lie half a line apart, for the banks.
template <typename T>
__device__ __forceinline__ int term_bytes(int n_cols) {
    return n_vector_chunks(n_cols) * CHUNK_COLS * static_cast<int>(sizeof(T)) + LINE_BYTES / 2;
}

template <typename T>
__device__ __forceinline__ uint32_t nearest_pair(float2 v);
template <>
__device__ __forceinline__ uint32_t nearest_pair<__half>(float2 v) {
    const __half2 pair = __floats2half2_rn(v.x, v.y);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t nearest_pair<__nv_bfloat16>(float2 v) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
struct Vector {
    char* terms;
    int n_cols;

    __device__ __forceinline__ char* term(int i) const { return terms + i * term_bytes<T>(n_cols); }

    // A power of two for a warp's columns, of which none is larger than largest, and its inverse.
    __device__ __forceinline__ static float2 scale_of(float largest) {
        if constexpr (std::is_same_v<T, __half>) {
            const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
            const int up = max(-126, min(126, 14 - exponent));
            return make_float2(__uint_as_float((127 + up) << 23), __uint_as_float((127 - up) << 23));
        } else {
            return make_float2(1.0f, 1.0f);
        }
    }

    // Where the pair of columns col and col + 1 lies in a term of 16-bit elements, col + 2 and col + 3 eight bytes on.
    __device__ __forceinline__ static int pair_at(int col) { return col / 8 * 16 + col % 8; }

    // Columns col to col + 3 become v, already scaled.
    __device__ __forceinline__ void store(int col, float4 v) const {
        if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<float4*>(term(0) + col * 4) = v;
        } else {
            float2 low = make_float2(v.x, v.y);
            float2 high = make_float2(v.z, v.w);
#pragma unroll
            for (int i = 0; i < N_TERMS<T>; i++) {
                uint32_t* to = reinterpret_cast<uint32_t*>(term(i) + pair_at(col));
                const uint32_t low_bits = nearest_pair<T>(low);
                const uint32_t high_bits = nearest_pair<T>(high);
                to[0] = low_bits;
                to[2] = high_bits;
                const float2 l = pair_of<T>(low_bits);
                const float2 h = pair_of<T>(high_bits);
                low = make_float2(low.x - l.x, low.y - l.y);
                high = make_float2(high.x - h.x, high.y - h.y);
            }
        }
    }

    // Where this lane's 16 bytes lie in the warp's first chunk of the vector's terms and, of weight row lane / 4, of the row:
    // the two halves of a line.
    struct Places {
        const char* x0;
        const char* x1;
        int w0;
        int w1;
    };
    __device__ __forceinline__ Places places(int warp) const {
        constexpr int HALF = LINE_BYTES / 2;
        const int group = lane_id() / 4;
        const int in_half = warp * CHUNK_BYTES + lane_id() % 4 * 16;
        const char* x = term(has_term() ? group % 4 : 0) + in_half;
        return {
            x + group / 4 * HALF, x + (1 - group / 4) * HALF, in_half + (group & 1) * HALF, in_half + (~group & 1) * HALF
        };
    }
    __device__ __forceinline__ static bool has_term() { return lane_id() / 4 % 4 < N_TERMS<T>; }

    __device__ __forceinline__ static uint4 load(const char* from) { return *reinterpret_cast<const uint4*>(from); }

    // A chunk of terms.
    __device__ __forceinline__ static void load_terms(const char* x0, const char* x1, uint4 (&x)[CHUNK_LOADS]) {
        x[0] = load(x0);
        x[1] = load(x1);
        x[2] = load(x0 + LINE_BYTES);
        x[3] = load(x1 + LINE_BYTES);
    }

    // A chunk of a row, which may end within it: what lies past the row in its slot is anything, and NaN times zero is not
    // zero.
    __device__ __forceinline__ void load_weights(const char* row, int w0, int w1, uint4 (&w)[CHUNK_LOADS]) const {
        const auto load_row = [&](int at) { return at < n_cols * 2 ? load(row + at) : make_uint4(0, 0, 0, 0); };
        w[0] = load_row(w0);
        w[1] = load_row(w1);
        w[2] = load_row(w0 + LINE_BYTES);
        w[3] = load_row(w1 + LINE_BYTES);
    }

    // sums += products of a chunk of weights with the same chunk of terms.
    __device__ __forceinline__ static void add_chunk(
        float (&sums)[4][4], const uint4 (&x)[CHUNK_LOADS], const uint4 (&w)[CHUNK_LOADS]
    ) {
#pragma unroll
        for (int i = 0; i < CHUNK_LOADS; i++) {
            const uint32_t left[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            multiply_matrices<T>(sums[i % 2 * 2], left, w[i].x, w[i].y);
            multiply_matrices<T>(sums[i % 2 * 2 + 1], left, w[i].z, w[i].w);
        }
    }

    // Which of the rows of a product a lane's sum is of; PRODUCT_ROWS for those of none.
    __device__ __forceinline__ static int product_row() {
        if constexpr (sizeof(T) == 2) {
            return lane_id() % 16 < 4 ? lane_id() % 4 * 2 + lane_id() / 16 : PRODUCT_ROWS;
        } else {
            return lane_id() == 0 ? 0 : PRODUCT_ROWS;
        }
    }

    // The product of weight row product_row() with the warp's columns. row is this lane's: weight row lane / 4; of f32 there
    // is one row alone.
    template <int N_WARPS>
    __device__ __forceinline__ float product(const char* row, int warp) const {
        if constexpr (sizeof(T) == 4) {
            float sum = 0.0f;
            for (int col = warp * CHUNK_COLS + lane_id() * 4; col < n_cols; col += N_WARPS * CHUNK_COLS) {
                const float4 w = four_of(reinterpret_cast<const float*>(row) + col);
                const float4 x = four_of(reinterpret_cast<const float*>(term(0)) + col);
                sum = fmaf(w.w, x.w, fmaf(w.z, x.z, fmaf(w.y, x.y, fmaf(w.x, x.x, sum))));
            }
            return warp_sum(sum);
        } else {
            Places at = places(warp);
            float sums[4][4] = {};
            int begin = warp * CHUNK_COLS;
#pragma unroll 2
            for (; begin + CHUNK_COLS <= n_cols; begin += N_WARPS * CHUNK_COLS) {
                uint4 x[CHUNK_LOADS];
                load_terms(at.x0, at.x1, x);
                const uint4 w[CHUNK_LOADS] = {
                    load(row + at.w0), load(row + at.w1), load(row + at.w0 + LINE_BYTES), load(row + at.w1 + LINE_BYTES)
                };
                add_chunk(sums, x, w);
                at.x0 += N_WARPS * CHUNK_BYTES;
                at.x1 += N_WARPS * CHUNK_BYTES;
                row += N_WARPS * CHUNK_BYTES;
            }
            if (begin < n_cols) {
                uint4 x[CHUNK_LOADS];
                uint4 w[CHUNK_LOADS];
                load_terms(at.x0, at.x1, x);
                const int in_row = warp * CHUNK_COLS * 2 - begin * 2;
                load_weights(row + in_row, at.w0 - in_row, at.w1 - in_row, w);
                add_chunk(sums, x, w);
            }
            return row_sum(sums);
        }
    }

    // The warp's columns of weight row lane / 4: at most HELD_CHUNKS chunks.
    struct HeldRows {
        uint4 chunks[HELD_CHUNKS][CHUNK_LOADS];
    };
    template <int N_WARPS>
    __device__ __forceinline__ bool has_chunk(int c, int warp) const {
        return (warp + c * N_WARPS) * CHUNK_COLS < n_cols;
    }
    template <int N_WARPS>
    __device__ __forceinline__ void hold_rows(const char* row, int warp, HeldRows& w) const {
        const Places at = places(warp);
#pragma unroll
        for (int c = 0; c < HELD_CHUNKS; c++) {
            load_weights(row, at.w0 + c * N_WARPS * CHUNK_BYTES, at.w1 + c * N_WARPS * CHUNK_BYTES, w.chunks[c]);
        }
    }
    // product, of rows that are held.
    template <int N_WARPS>
    __device__ __forceinline__ float held_product(const HeldRows& w, int warp) const {
        const Places at = places(warp);
        float sums[4][4] = {};
#pragma unroll
        for (int c = 0; c < HELD_CHUNKS; c++) {
            if (has_chunk<N_WARPS>(c, warp)) {
                uint4 x[CHUNK_LOADS];
                load_terms(at.x0 + c * N_WARPS * CHUNK_BYTES, at.x1 + c * N_WARPS * CHUNK_BYTES, x);
                add_chunk(sums, x, w.chunks[c]);
            }
        }
        return row_sum(sums);
    }

    __device__ __forceinline__ static float row_sum(const float (&sums)[4][4]) {
        // Even weight rows are products with the first four groups, odd ones with the others.
        const float even = (sums[0][0] + sums[1][2]) + (sums[2][0] + sums[3][2]);
        const float odd = (sums[0][1] + sums[1][3]) + (sums[2][1] + sums[3][3]);
        float sum = has_term() ? lane_id() < WARP / 2 ? even : odd : 0.0f;
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        sum += __shfl_xor_sync(0xffffffffu, sum, 8);
        return sum;
    }
};
