// scores: an input in 8 bits, and its products with rows in one to three bits.
//
// Computes   q[c] = round(x[c] * scale), scale = 127 / max |x|, as eight planes of bits; bit 7 counts -128
//            score[r] = sum_c w[r][c] q[c] with w = sum_p 2^(P - 1 - p) (1 - 2 bit_p)
//                     = sum_p 2^(P - 1 - p) sum_b value(b) (popcount(x_b) - 2 popcount(row_p & x_b))
// Source     popcounts of all planes of x at once: the one-bit product of tensor cores, PTX mma.m16n8k256 .and.popc
// Reference  reference::quantise, reference::score; equal bit for bit
// Shapes     planes of W (n_rows, n_words) u32 each, row-major, bits past the last column 0; planes of x as x_planes_words
//            words in the order of the lanes that read them, zero past the last column
// Needs      sm_80 or later, whole warps
// Warp       SCORE_ROWS rows of one plane against all eight planes of x. Rows 0 to 7 of the product are rows of W, rows
//            8 to 15 are ones, whose counts are those of x itself. Columns of the product may come in any order that
//            both sides keep: a lane reads 16 bytes of its row and of its plane of x, the words of two products
// Bytes      n_rows * n_words * 4 for each plane of W, once
// Order      integers alone

#pragma once

#include "common.cuh"

constexpr int X_PLANES = 8;
// Rows that a warp counts side by side.
constexpr int SCORE_ROWS = 8;
// Words of a row in a step of a warp: four for each of the four lanes that share a row.
constexpr int STEP_WORDS = 16;

__host__ __device__ constexpr int x_planes_steps(int n_words) { return (n_words + STEP_WORDS - 1) / STEP_WORDS; }
// Words of all planes of x: as many bytes as columns, in whole steps.
__host__ __device__ constexpr int x_planes_words(int n_words) {
    return x_planes_steps(n_words) * STEP_WORDS * X_PLANES;
}

// Where a word of a plane of x lies: lane 4 plane + i of a warp reads words 4 i to 4 i + 3 of a step as 16 bytes.
__device__ __forceinline__ int x_plane_at(int word, int plane) {
    const int in_step = word % STEP_WORDS;
    return (word / STEP_WORDS * WARP + plane * 4 + in_step / 4) * 4 + in_step % 4;
}

// Four columns in 8 bits, one in each byte; scale as quantise returns it.
__device__ __forceinline__ uint32_t quantised(float4 x, float scale) {
    // Adding it leaves the nearest integer, halves to even, in the low bits of a sum below 2^22.
    constexpr float ROUND = 12582912.0f;
    const uint32_t a = __float_as_uint(__fadd_rn(__fmul_rn(x.x, scale), ROUND));
    const uint32_t b = __float_as_uint(__fadd_rn(__fmul_rn(x.y, scale), ROUND));
    const uint32_t c = __float_as_uint(__fadd_rn(__fmul_rn(x.z, scale), ROUND));
    const uint32_t d = __float_as_uint(__fadd_rn(__fmul_rn(x.w, scale), ROUND));
    const uint32_t bytes = __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    // Without a scale, x may be infinite or NaN.
    return scale == 0.0f ? 0 : bytes;
}

// Plane that plane_word gives a lane.
__device__ __forceinline__ int plane_of_lane() {
    return (lane_id() & 1) << 2 | (lane_id() >> 1 & 3);
}

// Word plane_of_lane() of the 32 columns whose bytes eight neighbouring lanes hold, four each in order. The five bits of
// a bit's place in bytes are column (2), plane (3); those of the lane are column (3). Columns move down within a lane,
// then planes to the lanes.
__device__ __forceinline__ uint32_t plane_word(uint32_t bytes) {
    uint32_t v = bytes;
    const uint32_t high = (v >> 14 ^ v) & 0x0000ccccu;
    v ^= high ^ high << 14;
    const uint32_t low = (v >> 7 ^ v) & 0x00aa00aau;
    v ^= low ^ low << 7;
    uint32_t other = __shfl_xor_sync(0xffffffffu, v, 4);
    v = __byte_perm(v, other, lane_id() & 4 ? 0x3276 : 0x5410);
    other = __shfl_xor_sync(0xffffffffu, v, 2);
    v = __byte_perm(v, other, lane_id() & 2 ? 0x3715 : 0x6240);
    other = __shfl_xor_sync(0xffffffffu, v, 1);
    return lane_id() & 1 ? (other >> 4 & 0x0f0f0f0fu) | (v & 0xf0f0f0f0u)
                         : (v & 0x0f0f0f0fu) | (other << 4 & 0xf0f0f0f0u);
}

// The bits of the largest magnitude of four columns, which compare as the magnitudes do, NaN above all.
__device__ __forceinline__ uint32_t largest_of(float4 x) {
    return max(
        max(__float_as_uint(fabsf(x.x)), __float_as_uint(fabsf(x.y))),
        max(__float_as_uint(fabsf(x.z)), __float_as_uint(fabsf(x.w)))
    );
}

// The scale of an input for the bits of its largest magnitude; 0 where x has none (all zero, not finite, too small).
__device__ __forceinline__ float scale_of(uint32_t largest) {
    const float scale = __fdiv_rn(127.0f, __uint_as_float(largest));
    return scale > 0.0f && scale < INFINITY ? scale : 0.0f;
}

// Columns col to col + 3 of x, a lane's own, to the planes. Lanes hold neighbouring columns, those of a warp four words.
__device__ __forceinline__ void store_planes(uint32_t* planes, int col, float4 x, float scale) {
    planes[x_plane_at(col / WARP, plane_of_lane())] = plane_word(quantised(x, scale));
}

// The largest over the threads of Team on every one. scratch holds a word for each warp. Ends past a barrier.
template <typename Team = WholeBlock>
__device__ __forceinline__ uint32_t block_max(uint32_t v, uint32_t* scratch) {
    v = __reduce_max_sync(0xffffffffu, v);
    if (lane_id() == 0) {
        scratch[warp_id()] = v;
    }
    Team::sync();
    return __reduce_max_sync(0xffffffffu, lane_id() < Team::n_threads() / WARP ? scratch[lane_id()] : 0);
}

// x in 8 bits, for the threads of a block: values(col) are the columns from col on, a multiple of 4 below
// 32 * STEP_WORDS * x_planes_steps(n_words), with zeros past the last. Returns the scale to all threads. scratch holds a
// word for each warp. Needs a barrier before planes are read.
template <typename Values>
__device__ __forceinline__ float quantise(int n_words, uint32_t* planes, uint32_t* scratch, const Values& values) {
    const int n_cols = x_planes_steps(n_words) * STEP_WORDS * WARP;
    uint32_t largest = 0;
#pragma unroll 4
    for (int col = 4 * threadIdx.x; col < n_cols; col += 4 * blockDim.x) {
        largest = max(largest, largest_of(values(col)));
    }
    const float scale = scale_of(block_max(largest, scratch));
#pragma unroll 4
    for (int col = 4 * threadIdx.x; col < n_cols; col += 4 * blockDim.x) {
        store_planes(planes, col, values(col), scale);
    }
    return scale;
}

// Counts of SCORE_ROWS rows so far; this lane's part is the sum of two, so that one product does not wait for the one
// before. Row lane / 4 has planes 2 (lane % 4) and the next of x in the first two, those of x itself come after.
struct ScoreCounts {
    int32_t n[2][4] = {};

    __device__ __forceinline__ void add(int half, uint32_t w0, uint32_t w1, uint32_t x0, uint32_t x1) {
        int32_t* c = n[half];
        asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(w0), "r"(0xffffffffu), "r"(w1), "r"(0xffffffffu), "r"(x0), "r"(x1));
    }

    // The planes so far count double, then the next. words_at(word) are the words of row lane / 4 from word on, a
    // multiple of 4 below n_words, with zeros past the last; of so many steps at a time. WHOLE: n_words is whole steps.
    template <int STEPS = 4, bool WHOLE = false, typename WordsAt>
    __device__ __forceinline__ void add_plane(int n_words, const uint32_t* x_planes, const WordsAt& words_at) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            n[i / 4][i % 4] *= 2;
        }
        const uint4* planes = reinterpret_cast<const uint4*>(x_planes) + lane_id();
#pragma unroll STEPS
        for (int step = 0; step < x_planes_steps(n_words); step++) {
            const int word = step * STEP_WORDS + lane_id() % 4 * 4;
            const uint4 w = WHOLE || word < n_words ? words_at(word) : make_uint4(0, 0, 0, 0);
            const uint4 x = planes[step * WARP];
            add(0, w.x, w.y, x.x, x.y);
            add(1, w.z, w.w, x.z, x.w);
        }
    }

    // The score of row lane / 4, on its four lanes.
    __device__ __forceinline__ int32_t score() const {
        const int plane = lane_id() % 4 * 2;
        const int32_t even = n[0][2] + n[1][2] - 2 * (n[0][0] + n[1][0]);
        const int32_t odd = n[0][3] + n[1][3] - 2 * (n[0][1] + n[1][1]);
        int32_t sum = even * (1 << plane) + odd * (plane + 1 == X_PLANES - 1 ? -128 : 2 << plane);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        return sum;
    }
};

// Rows in bits, in global memory.
struct BitRows {
    const uint32_t* signs;  // plane 0
    const uint32_t* low;    // the planes below, (n_planes - 1, n_rows, n_words)
    int32_t n_planes;
    int32_t n_rows;
    int32_t n_words;

    __device__ __forceinline__ const uint32_t* row(int plane, int row) const {
        const int64_t at = static_cast<int64_t>(row) * n_words;
        return plane == 0 ? signs + at : low + static_cast<int64_t>(plane - 1) * n_rows * n_words + at;
    }

    // Asks for the signs of rows begin..end, those of SCORE_ROWS rows at once. Planes below come in the meantime: asked for
    // here, they delay the signs and what the kernel before still reads.
    __device__ __forceinline__ void prefetch(int begin, int end) const {
        if (n_words % 4 != 0 || lane_id() > 0) {
            return;
        }
        for (int first = begin + warp_id() * SCORE_ROWS; first < end; first += blockDim.x / WARP * SCORE_ROWS) {
            prefetch_l2(row(0, first), min(SCORE_ROWS, end - first) * n_words * sizeof(uint32_t));
        }
    }

    // The score of this lane's row, the same for the four lanes from a multiple of 4 on. All lanes of a warp call.
    __device__ __forceinline__ int32_t score(int i, const uint32_t* x_planes) const {
        ScoreCounts counts;
        for (int plane = 0; plane < n_planes; plane++) {
            const uint32_t* words = row(plane, i);
            if (n_words % 4 == 0) {
                counts.add_plane<8>(n_words, x_planes, [&](int word) { return load_weights(words + word); });
            } else {
                counts.add_plane<1>(n_words, x_planes, [&](int word) {
                    const auto at = [&](int k) { return word + k < n_words ? __ldg(words + word + k) : 0; };
                    return make_uint4(at(0), at(1), at(2), at(3));
                });
            }
        }
        return counts.score();
    }

    // put(i, score) on one lane for each of the rows begin..end; the warps of the block take SCORE_ROWS in turn.
    template <typename Put>
    __device__ __forceinline__ void scores(int begin, int end, const uint32_t* x_planes, const Put& put) const {
        for (int first = begin + warp_id() * SCORE_ROWS; first < end; first += blockDim.x / WARP * SCORE_ROWS) {
            const int at = first + lane_id() / 4;
            const int32_t of_row = score(min(at, end - 1), x_planes);
            if (lane_id() % 4 == 0 && at < end) {
                put(at, of_row);
            }
        }
    }
};

// True if a row of this score is computed, for the bits of its threshold. One that is no number at this scale keeps it.
__device__ __forceinline__ bool is_kept(int32_t score, uint32_t threshold, float scale) {
    return !(__int2float_rn(score) < __fmul_rn(__uint_as_float(threshold), scale));
}
