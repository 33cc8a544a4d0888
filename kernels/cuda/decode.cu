// decode: one whole token in one kernel, which keeps memory busy from the embedding to the logits.
//
// Computes   x = embedding[token]; for each layer what qkv, attention, matvec, gate_up and down compute, in that order;
//            logits = lm_head rmsnorm(x); with greedy, the next token too. Rows are predicted by signs or planes, or by
//            factors of low rank as in low_rank.cuh
// Source     persistent kernels for whole models: Megakernels (Hazy Research, 2025); a warp that loads for the others:
//            the pipelines of CUTLASS
// Reference  the five kernels above, each tested against reference; within TOLERANCE (sum order)
// Shapes     as theirs; x_out (d,) f32; down_parts (gridDim.x, d) f32; part_sums (n_heads, n_splits_max, head_dim) f32,
//            part_maxima (n_heads, n_splits_max, 2) f32; best (gridDim.x, 2) u32; sync (2,) u32: arrivals, and arrivals
//            before this launch; for audits mlp_x (n_layers, d) f32, mlp_h (n_layers, n_rows) f32, mlp_skip u8 likewise
// Needs      rows of 16-byte multiples, all matrices of one type, at most 128 layers; checked in cuda::launch
// Grid       one block for each SM, launched cooperatively; a phase of the model ends at a barrier of the whole grid
// Block      DECODE_WARPS warps that compute, one that loads, and three that leave their registers to the first (sm_90a);
//            shared memory: the vector, small lists, and the ring
// Loads      Every row of weights comes through the ring, in the order of the model and across phases, so that while the
//            block waits at a barrier or attends, the weights of the next dense phase arrive. The loading warp knows the
//            order; kept rows of the MLP it brings as the predictor lists them, active rows as gates come. Rows that nobody
//            waits for yet come slowly, as the loads of a norm or of attention would queue behind them. The first rows of a
//            phase move on to registers before their vector is there, and leave the ring to more. L2 gives up rows, which
//            are read once, before what blocks leave for each other, and is asked for rows of the next layer when memory
//            has nothing else to do
// Rows       of a block are neighbours. The down projection multiplies the same neurons' rows of w_down_t, so that h
//            stays in the block, and leaves a part of the sum; after a barrier each block adds up the parts of its own
//            columns
// Bytes      weights, sign words or planes and cached positions that the token needs, each once; parts of the down
//            projection through L2, 4 gridDim.x d bytes written and read
// Order      the work of each block, warp and lane is fixed by the shapes, the position and h: repeatable bit for bit.
//            Where a product is added to is fixed, too, so that the kernels of all widths agree
// Measured   H100 80GB, sm_90a, f16, context 512, 7B shape: dense 4.60 ms a token, 2930 GB/s, 96 % of the read
//            bandwidth; predicted (21 % of rows kept, 10 % active) 2.31 ms, 2670 GB/s, 87 %; records/
// Tried      programmatic dependent launch of the five kernels: early blocks of the next kernel pack two to an SM and
//            leave others empty (7B dense: 6.5 ms a token against 5.8 without). Asking L2 for more rows ahead, all at once or
//            in other phases (cp.async.bulk.prefetch.L2): no faster, or up to 5 % slower. Planes before the grid has passed
//            the output: 1 % slower, as barriers wait behind loads. Shares in proportion to the speed of each SM
//            (those of small CPCs read 1.36 times as fast): blocks end together, the token as late as before. Products by
//            fused multiply-adds and a ring for each warp: 1 us for each 4 KB of a warp, as long as memory takes. A ring
//            off a line of 128 bytes: 10 % slower. All slots on their way at once: a load in attention's or a norm's way
//            takes 6 us. Phases one after the other in code, instead of loops over them: 15 % slower, instructions miss
//            their cache. Spilled registers: they leave L1 at each barrier of the grid, and cost 0.5 us a phase. Sixteen
//            warps that compute: dense 21 % slower. The vector's fragments in registers for a whole phase: products faster,
//            norms and attention slower by as much. Signs of all rows counted before the first is listed: 1 us less for the
//            predictor, 2 us more for its rows. The output's rows held back until the grid has its queries: 1 % slower.
//            A line that all blocks ask for comes at 64 bytes a clock: chunks' maxima read by each warp, 3 us a layer

#include "low_rank.cuh"
#include "ring.cuh"
#include "vector.cuh"

constexpr int DECODE_WARPS = 8;
// Threads that compute; of four warps beside them one loads. Registers change hands by fours.
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;
constexpr int DECODE_BLOCK = DECODE_THREADS + 4 * WARP;
constexpr int KV_IN_FLIGHT = 10;
constexpr int KV_DIMS = 8;
// Rows of sign words in a slot of the ring.
constexpr int UNIT_ROWS = 16;
// Rows of sign words that a warp counts side by side.
constexpr int SIGN_ROWS = 4;
// In the lists that the loading warp follows, where no row is yet.
constexpr int NOT_LISTED = -1;
// Rows of the down projection at a time.
constexpr int DOWN_ROWS = 4;
// Clocks between rows that L2 is asked for: a row of 8 KB of every block is half of what memory gives.
constexpr uint32_t AHEAD_CLOCKS = 1200;
// Parts of the down projection that a thread has in flight: those of 136 blocks in one round.
constexpr int ADD_PARTS = 17;
constexpr int MERGE_COLS = 4;
constexpr int MERGE_SPLITS = 4;
constexpr int SPLIT_POSITIONS = 128;
constexpr int LAYERS_MAX = 128;

struct DecodeLayer {
    const void* w_q;
    const void* w_k;
    const void* w_v;
    const void* w_o;
    const void* w_gate;
    const void* w_up;
    const void* w_down_t;
    const uint32_t* signs;
    const uint32_t* low;     // planes below the signs
    const uint32_t* limits;  // of a score as bits of f32
    const float* attn_norm;
    const float* mlp_norm;
    void* keys;
    void* values;
    uint32_t limit;
    uint32_t rows;      // Rows of gate_up.cu
    uint32_t n_planes;  // of W_gate, where rows are predicted by their score; 0 where by their signs
    LowRank factors;    // predict in place of planes, whose signs are then those of a residual
};

struct DecodeArgs {
    const void* embedding;
    const void* lm_head;
    const float* final_norm;
    const float* cos;
    const float* sin;
    State* state;
    uint32_t* ids;
    float* x_out;
    float* q;
    float* part_sums;
    float* part_maxima;
    float* down_parts;
    float* inner;  // of factors, (rank,)
    float* logits;
    uint32_t* best;
    uint32_t* sync;
    unsigned long long* counts;  // (n_layers, 2): rows kept, rows active
    unsigned long long* clocks;  // (gridDim.x, STEPS) clocks of each block by step, added to; null for none
    int32_t d;
    int32_t q_cols;  // n_heads * head_dim
    int32_t n_layers;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t head_lanes;  // lanes that hold one position: a power of two, head_dim / 8 or more
    int32_t n_splits_max;
    int32_t n_rows;  // intermediate_size
    int32_t vocab_size;
    int32_t n_positions_max;
    int32_t n_ids;
    int32_t slot_bytes;    // of the ring, for one row
    int32_t n_slots;
    int32_t in_flight;       // rows on their way at once
    int32_t in_flight_idle;  // the same while their phase has not begun
    int32_t ahead_rows;      // rows of the next layer that L2 is asked for
    int32_t product_rows;  // rows of a product: what half of the ring holds, at most PRODUCT_ROWS
    int32_t vec_floats;    // room for the vector, and for what attention passes between warps
    int32_t tile_rows;     // rows whose partial sums there is room for, an even number
    int32_t own_cols;      // room for the columns of the block
    int32_t list_rows;     // room in the lists of rows
    int32_t ringed_signs;  // sign words come through the ring; 0 where rows do not divide into 16 bytes
    int32_t greedy;
    uint32_t activation;
    float threshold;
    float eps;
    float scale;           // log2(e) / sqrt(head_dim)
    float heads_per_pair;  // 2 / head_dim
    // What an audit looks at; null for none.
    float* mlp_x;       // the MLP's input after its norm
    float* mlp_h;       // 0 where a row is left out
    uint8_t* mlp_skip;  // 1 where the predictor left a row out
    DecodeLayer layers[LAYERS_MAX];
};

// What the ring brings, in order; active rows of up come after the MLP's first rows where the gate chooses them. Dealt to
// the blocks are pairs of rows of q, k and v, rows of the output, neurons, and rows of lm_head.
enum Phase { QKV, OUT, MLP, HEAD, SHARES, UP_ROWS };

// What a token's clocks are spent on. A wait is for the other blocks.
enum Step {
    NORM_QKV,
    ROWS_QKV,
    WAIT_QKV,
    ATTEND,
    WAIT_ATTEND,
    MERGE,
    ROWS_OUT,
    WAIT_OUT,
    NORM_MLP,
    PREDICT,
    ROWS_MLP,
    GATE,
    UP,
    DOWN,
    WAIT_DOWN,
    ADD_DOWN,
    WAIT_X,
    NORM_HEAD,
    ROWS_HEAD,
    FINISH,
    STEPS
};

// The kernel starts with 168 registers for each of its threads. The four warps that do not compute leave 112 of theirs,
// and those that compute take 56 more. On sm_90a alone: elsewhere nothing has room to hold rows of weights.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool MOVES_REGISTERS = true;
__device__ __forceinline__ void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 56;"); }
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 224;"); }
#else
constexpr bool MOVES_REGISTERS = false;
__device__ __forceinline__ void leave_registers() {}
__device__ __forceinline__ void take_registers() {}
#endif

// A barrier of the warps that compute.
struct Computing {
    static constexpr int N_THREADS = DECODE_THREADS;
    __device__ __forceinline__ static int n_threads() { return N_THREADS; }
    __device__ __forceinline__ static void sync() { asm volatile("bar.sync 1, %0;" ::"n"(N_THREADS) : "memory"); }
};

// What the loading warp and the computing ones both know: the layout of shared memory and the rows of the block.
template <typename T>
struct Layout {
    const DecodeArgs& a;

    // Shared memory, one array after the other; every length is a multiple of four.
    __device__ __forceinline__ static float* memory() {
        extern __shared__ float4 shared[];
        return reinterpret_cast<float*>(shared);
    }
    __device__ __forceinline__ float* tile() const { return memory() + a.vec_floats; }
    // x of the block's columns.
    __device__ __forceinline__ float* own_x() const { return tile() + a.tile_rows * DECODE_WARPS; }
    __device__ __forceinline__ float* h_rows() const { return own_x() + a.own_cols; }
    __device__ __forceinline__ int* kept() const { return reinterpret_cast<int*>(h_rows() + a.list_rows); }
    __device__ __forceinline__ int* active() const { return kept() + a.list_rows; }
    // The active rows as they were found, which the loading warp follows.
    __device__ __forceinline__ int* found() const { return active() + a.list_rows; }
    __device__ __forceinline__ uint32_t* x_signs() const { return reinterpret_cast<uint32_t*>(found() + a.list_rows); }
    // The planes of the vector in 8 bits, where rows are predicted by their score.
    __device__ __forceinline__ uint32_t* x_planes() const { return x_signs(); }
    __device__ __forceinline__ RingRoom ring_room() const {
        const uintptr_t end = reinterpret_cast<uintptr_t>(x_planes() + x_planes_words(n_words()));
        const uintptr_t slots = (end + RING_ALIGN - 1) & -static_cast<uintptr_t>(RING_ALIGN);
        return {reinterpret_cast<char*>(slots), a.slot_bytes, a.n_slots};
    }
    __device__ __forceinline__ int n_words() const { return (a.d + WARP - 1) / WARP; }

    // Registers have room for the rows of a product.
    __device__ __forceinline__ static bool holds(int n_cols) {
        return MOVES_REGISTERS && sizeof(T) == 2 && n_cols <= HELD_CHUNKS * DECODE_WARPS * CHUNK_COLS;
    }

    // Lengths of the lists of rows, and what the loading warp is told by barriers, one thread for all.
    struct Lists {
        int n_kept;
        int n_active;
        uint64_t has_kept;    // kept rows are all listed, once a layer that predicts
        uint64_t has_active;  // so are active rows, once a layer that lists them
        uint64_t has_phase;   // the rows of the next phase are waited for
        uint64_t may_load;    // the grid has passed the phase before the MLP, and the lists of rows are empty
    };
    __device__ __forceinline__ static Lists& lists() {
        __shared__ Lists all;
        return all;
    }

    struct Share {
        int begin;
        int count;
    };
    __device__ __forceinline__ static Share* shares() {
        __shared__ Share all[SHARES];
        return all;
    }
    __device__ __forceinline__ static Share share(int phase) { return shares()[phase]; }

    __device__ __forceinline__ void make_shares() const {
        if (threadIdx.x < SHARES) {
            const int n_units = threadIdx.x == QKV   ? (a.n_heads + 2 * a.n_kv_heads) * (a.head_dim / 2)
                                : threadIdx.x == OUT ? a.d
                                : threadIdx.x == MLP ? a.n_rows
                                                     : a.vocab_size;
            const int begin = share_begin(n_units, blockIdx.x, gridDim.x);
            const int end = share_begin(n_units, blockIdx.x + 1, gridDim.x);
            shares()[threadIdx.x] = {begin, end - begin};
        }
    }

    // Head of a pair of rows, counted through q, k and v: exact for the few million pairs that there can be.
    __device__ __forceinline__ int head_of(int pair) const {
        return __float2int_rd((static_cast<float>(pair) + 0.5f) * a.heads_per_pair);
    }

    __device__ __forceinline__ const T* qkv_row(const DecodeLayer& w, int i) const {
        const int half = a.head_dim / 2;
        const int pair = share(QKV).begin + i / 2;
        int head = head_of(pair);
        const int dim = pair - head * half + (i & 1) * half;
        const void* matrix = w.w_q;
        if (head >= a.n_heads + a.n_kv_heads) {
            head -= a.n_heads + a.n_kv_heads;
            matrix = w.w_v;
        } else if (head >= a.n_heads) {
            head -= a.n_heads;
            matrix = w.w_k;
        }
        return static_cast<const T*>(matrix) + static_cast<int64_t>(head * a.head_dim + dim) * a.d;
    }

    __device__ __forceinline__ BitRows bit_rows(const DecodeLayer& w) const {
        return {w.signs, w.low, max(1, static_cast<int>(w.n_planes)), a.n_rows, n_words()};
    }
};

// What the ring brings, in order: pairs of rows of q, k and v; rows of the output; planes of sign words where the layer
// predicts; rows of the gate, all or kept, or of gate and up in turn; active rows of up; rows of w_down_t; after the last
// layer, rows of lm_head.
enum Load { LOAD_QKV, LOAD_OUT, LOAD_PLANES, LOAD_GATE, LOAD_UP, LOAD_DOWN, LOAD_HEAD };

// The warp that loads: every row of the block, in the order in which the other warps use them.
template <typename T, bool ANY>
struct Loader {
    const Layout<T>& m;
    RingWriter ring;
    uint32_t kept_parity = 0;
    uint32_t active_parity = 0;
    uint32_t phase_parity = 0;
    uint32_t load_parity = 0;

    // Planes of UNIT_ROWS rows after each other.
    __device__ __forceinline__ RingRow plane(const BitRows& bits, int i) const {
        const auto share = m.share(MLP);
        const int unit = i / bits.n_planes;
        const int first = unit * UNIT_ROWS;
        const int n_rows = min(UNIT_ROWS, share.count - first);
        return {bits.row(i - unit * bits.n_planes, share.begin + first), n_rows * bits.n_words * 4};
    }

    __device__ __forceinline__ RingRow row_of(const void* matrix, int row, int n_cols) const {
        return {static_cast<const T*>(matrix) + static_cast<int64_t>(row) * n_cols, n_cols * static_cast<int>(sizeof(T))};
    }

    // Asks L2 for the factors that the block multiplies: its rows of the first, and of the second, which lie together.
    __device__ __forceinline__ void ask_for_factors(const LowRank& w) const {
#if __CUDA_ARCH__ >= 900
        const auto share = m.share(MLP);
        const int n_cols = m.a.d;
        if (n_cols % 8 == 0) {
            for (int k = blockIdx.x + lane_id() * gridDim.x; k < w.rank; k += WARP * gridDim.x) {
                ask_l2(w.fc1 + static_cast<int64_t>(k) * n_cols, n_cols * static_cast<int>(sizeof(__half)));
            }
        }
        if (w.rank % 8 == 0) {
            for (int i = lane_id() * SCORE_ROWS; i < share.count; i += WARP * SCORE_ROWS) {
                const int n_bytes = min(SCORE_ROWS, share.count - i) * w.rank * static_cast<int>(sizeof(__half));
                ask_l2(w.fc2 + static_cast<int64_t>(share.begin + i) * w.rank, n_bytes);
            }
        }
#endif
    }

    // Returns once the grid has passed the phase before the MLP. Memory has nothing to do until then, as the rows of that
    // phase have come and none after it may be in the others' way. L2 is asked for the first rows of the next layer that the
    // block has no room for, one after the other, as more of them at once were in the way as well.
    __device__ __forceinline__ void wait_for_mlp(int layer) {
#if __CUDA_ARCH__ >= 900
        const DecodeLayer& next = m.a.layers[min(layer + 1, m.a.n_layers - 1)];
        const int first = m.a.n_slots + (m.holds(m.a.d) ? m.a.product_rows : 0);
        const int n_rows = layer + 1 < m.a.n_layers ? min(m.a.ahead_rows, 2 * m.share(QKV).count - first) : 0;
        int n = 0;
        uint32_t asked = clock();
#pragma unroll 1
        while (!__all_sync(0xffffffffu, is_over(&m.lists().may_load, load_parity))) {
            const uint32_t now = clock();
            if (n < n_rows && now - asked >= AHEAD_CLOCKS) {
                if (lane_id() == 0) {
                    ask_l2(m.qkv_row(next, first + n), m.a.d * static_cast<int>(sizeof(T)));
                }
                asked = now;
                n++;
            }
        }
#else
        wait_at(&m.lists().may_load, load_parity);
#endif
        load_parity ^= 1;
    }

    // Rows of a list, as soon as each is there; whole flips once the list is.
    __device__ __forceinline__ void bring_listed(const void* matrix, int* list, uint64_t* whole, uint32_t& parity) {
        const auto share = m.share(MLP);
        int first = 0;
#pragma unroll 1
        while (true) {
            const bool is_whole = __all_sync(0xffffffffu, is_over(whole, parity));
            // An atomic operation that changes nothing: a load that knows of the others' stores.
            const int i = first + lane_id();
            const int row = i < share.count ? atomicMax(list + i, NOT_LISTED) : NOT_LISTED;
            const uint32_t missing = ~__ballot_sync(0xffffffffu, row != NOT_LISTED);
            const int n = min(missing == 0 ? WARP : __ffs(missing) - 1, ring.n_at_once());
            if (n > 0) {
                ring.push_some(n, [] { return true; }, [&](int i) {
                    return row_of(matrix, share.begin + __shfl_sync(0xffffffffu, row, i), m.a.d);
                });
                first += n;
            } else if (is_whole) {
                break;
            } else {
                __nanosleep(20);
            }
        }
        parity ^= 1;
    }

    __device__ __forceinline__ void bring(const DecodeLayer& w, int load) {
        const DecodeArgs& a = m.a;
        const int phase = load == LOAD_QKV ? QKV : load == LOAD_OUT ? OUT : load == LOAD_HEAD ? HEAD : MLP;
        const auto share = m.share(phase);
        const int n_cols = load == LOAD_OUT ? a.q_cols : a.d;
        const bool pairs = load == LOAD_GATE && w.rows == ALL;
        const bool listed = load == LOAD_DOWN && w.rows != ALL;
        const void* matrix = load == LOAD_OUT    ? w.w_o
                             : load == LOAD_HEAD ? a.lm_head
                             : load == LOAD_GATE ? w.w_gate
                                                 : w.w_down_t;
        int n = share.count;
        if (load == LOAD_QKV || pairs) {
            n *= 2;
        } else if (load == LOAD_PLANES) {
            n = (n + UNIT_ROWS - 1) / UNIT_ROWS * m.bit_rows(w).n_planes;
        } else if (listed) {
            n = m.lists().n_active;
        }
        const auto wanted = [&] { return is_over(&m.lists().has_phase, phase_parity); };
        ring.push(n, wanted, [&](int i) {
            if (load == LOAD_PLANES) {
                return plane(m.bit_rows(w), i);
            }
            if (load == LOAD_QKV) {
                return RingRow{m.qkv_row(w, i), n_cols * static_cast<int>(sizeof(T))};
            }
            const int row = listed ? m.active()[i] : pairs ? i / 2 : i;
            return row_of(pairs && i % 2 != 0 ? w.w_up : matrix, share.begin + row, n_cols);
        });
    }

    __device__ __forceinline__ void token() {
        const DecodeArgs& a = m.a;
        int layer = 0;
        int load = LOAD_QKV;
        // One loop, so that code is there once.
#pragma unroll 1
        while (true) {
            const DecodeLayer& w = a.layers[min(layer, a.n_layers - 1)];
            if (load == (w.rows == PREDICTED ? LOAD_PLANES : LOAD_UP) && w.rows != ALL) {
                // Before, blocks that are late would wait behind planes, and the memory has nothing to do after. The lists
                // of rows are empty from there on.
                wait_for_mlp(layer);
                if (ANY && load == LOAD_PLANES) {
                    ask_for_factors(w.factors);
                }
            }
            const bool has_planes = w.rows == PREDICTED && (!ANY || w.factors.rank == 0) && a.ringed_signs;
            const bool skips = load == LOAD_PLANES ? !has_planes : load == LOAD_UP && w.rows == ALL;
            if (load == LOAD_GATE && w.rows == PREDICTED) {
                bring_listed(w.w_gate, m.kept(), &m.lists().has_kept, kept_parity);
            } else if (load == LOAD_UP && !skips) {
                bring_listed(w.w_up, m.found(), &m.lists().has_active, active_parity);
            } else if (!skips) {
                bring(w, load);
            }
            if (load == LOAD_QKV || load == LOAD_OUT || load == LOAD_DOWN) {
                phase_parity ^= 1;
            }
            if (load == LOAD_HEAD) {
                break;
            }
            load++;
            if (load == LOAD_HEAD && ++layer < a.n_layers) {
                load = LOAD_QKV;
            }
        }
    }
};

// VEC_LOADS: so many times a thread has four columns of a vector. Columns that a model has not cost 2 % a token, though all
// branch around them: instructions come from a cache. ANY: layers may have factors, and the MLP may be traced; code for
// these costs a token without them 1 %.
template <typename T, int VEC_LOADS, bool ANY>
struct Decoder : Layout<T> {
    using Layout<T>::a;
    using Layout<T>::memory;
    using Layout<T>::tile;
    using Layout<T>::own_x;
    using Layout<T>::h_rows;
    using Layout<T>::kept;
    using Layout<T>::active;
    using Layout<T>::found;
    using Layout<T>::x_signs;
    using Layout<T>::x_planes;
    using Layout<T>::n_words;
    using Layout<T>::holds;
    using Layout<T>::lists;
    using Layout<T>::share;
    using Layout<T>::head_of;
    using Layout<T>::bit_rows;

    RingReader ring;
    uint32_t barriers = 0;
    uint32_t arrivals_before = 0;
    long long marked = 0;  // the clock at the last mark
    float unscale = 1.0f;  // of this warp's columns of the vector

    __device__ __forceinline__ Decoder(const Layout<T>& layout) : Layout<T>(layout), ring{layout.ring_room()} {}

    __device__ __forceinline__ static float* scratch() {
        __shared__ float floats[WARP];
        return floats;
    }
    __device__ __forceinline__ static void sync() { Computing::sync(); }
    __device__ __forceinline__ Vector<T> vec(int n_cols) const {
        return {reinterpret_cast<char*>(memory()), n_cols};
    }

    __device__ __forceinline__ static unsigned long long* step_clocks() {
        __shared__ unsigned long long clocks[STEPS];
        return clocks;
    }

    // What passed since the last mark was spent on step.
    __device__ __forceinline__ void mark(int step) {
        if (a.clocks != nullptr && threadIdx.x == 0) {
            const long long now = clock64();
            step_clocks()[step] += now - marked;
            marked = now;
        }
    }

    __device__ __forceinline__ void start_marks() {
        if (a.clocks != nullptr && threadIdx.x == 0) {
            for (int step = 0; step < STEPS; step++) {
                step_clocks()[step] = 0;
            }
            marked = clock64();
        }
    }

    __device__ __forceinline__ void store_marks() const {
        if (a.clocks != nullptr && threadIdx.x == 0) {
            for (int step = 0; step < STEPS; step++) {
                a.clocks[blockIdx.x * STEPS + step] += step_clocks()[step];
            }
        }
    }

    using HeldRows = typename Vector<T>::HeldRows;

    // tile[i * DECODE_WARPS + warp] = sum, a lane's of a product of n rows, which begin at row first of the tile.
    __device__ __forceinline__ void store_sums(float sum, int first, int n) const {
        const int i = Vector<T>::product_row();
        if (i < n) {
            tile()[(first + i) * DECODE_WARPS + warp_id()] = sum * unscale;
        }
    }

    // The next n rows from the ring into registers. Without any, registers hold whatever: were they left as they are, the
    // compiler would keep them through the whole loop.
    __device__ __forceinline__ void hold_rows(int n_cols, int n, HeldRows& rows) {
        const char* row = reinterpret_cast<const char*>(memory());
        if (n > 0) {
            row = ring.arrived(min(lane_id() / 4, n - 1));
        }
        vec(n_cols).template hold_rows<DECODE_WARPS>(row, warp_id(), rows);
        if (n > 0) {
            ring.pass(n);
        }
    }

    // tile[i * DECODE_WARPS + warp] = the product of row i of the tile with the warp's columns of the vector, for rows first
    // to n - 1, which the ring brings next.
    __device__ __forceinline__ void multiply_rows(int n_cols, int first, int n) {
        const Vector<T> x = vec(n_cols);
#pragma unroll 1
        while (first < n) {
            const int n_rows = min(sizeof(T) == 2 ? a.product_rows : 1, n - first);
            // A lane waits for every row that it reads itself.
            const char* row = ring.arrived(sizeof(T) == 2 ? min(lane_id() / 4, n_rows - 1) : 0);
            store_sums(x.template product<DECODE_WARPS>(row, warp_id()), first, n_rows);
            ring.pass(n_rows);
            first += n_rows;
        }
    }

    __device__ __forceinline__ float tile_row(int i) const {
        const float4* sums = reinterpret_cast<const float4*>(tile() + i * DECODE_WARPS);
        const float4 v = add(sums[0], sums[1]);
        return (v.x + v.y) + (v.z + v.w);
    }

    // A barrier of the grid in two halves; what every block wrote before arrive() is seen by all after wait().
    __device__ __forceinline__ void arrive() {
        sync();
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.sync) : "memory");
        }
        barriers++;
    }

    // With may_load, the loading warp is told.
    __device__ __forceinline__ void wait(bool may_load = false) {
        if (threadIdx.x == 0) {
            const uint32_t wanted = arrivals_before + barriers * gridDim.x;
            uint32_t arrivals;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrivals) : "l"(a.sync) : "memory");
            } while (static_cast<int32_t>(arrivals - wanted) < 0);
            if (may_load && !ALL_ARRIVE) {
                arrive_at(&lists().may_load);
            }
        }
        if (ALL_ARRIVE && may_load) {
            arrive_at(&lists().may_load);
        }
        sync();
    }

    static __device__ __forceinline__ float4 add(float4 v, float4 w) {
        return make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
    }

    static __device__ __forceinline__ float4 scaled(float4 v, float f) {
        return make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
    }

    // A thread's columns of the vector, which are its warp's own to multiply: four from first_column() + k * LOAD_COLS on,
    // for each k.
    static constexpr int LOAD_COLS = DECODE_THREADS * 4;
    __device__ __forceinline__ static int first_column() {
        // Opaque: columns worked out once for the whole kernel would be spilled, and what is spilled has left L1 after each
        // barrier of the grid.
        uint32_t thread;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        return static_cast<int>(thread) * 4;
    }
    // Some thread has columns there: a branch of all, around code that most widths do not need.
    __device__ __forceinline__ static bool has_columns(int k, int n_cols) { return k * LOAD_COLS < n_cols; }

    // The vector becomes v.
    __device__ __forceinline__ void store_vec(int n_cols, const float4 (&v)[VEC_LOADS]) {
        const Vector<T> x = vec(n_cols);
        const int first = first_column();
        float largest = 0.0f;
        if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
            for (int k = 0; k < VEC_LOADS; k++) {
                largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v[k].x), fabsf(v[k].y)), fmaxf(fabsf(v[k].z), fabsf(v[k].w))));
            }
            largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
        }
        const float2 scale = x.scale_of(largest);
        unscale = scale.y;
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            const int col = first + k * LOAD_COLS;
            if (has_columns(k, n_cols) && col < n_vector_chunks(n_cols) * CHUNK_COLS) {
                x.store(col, scaled(v[k], scale.x));
            }
        }
        __syncwarp();
    }

    // A norm's weights of a thread's columns, asked for here: the vector that they belong to comes later.
    __device__ __forceinline__ void load_norm(const float* norm, float4 (&weight)[VEC_LOADS]) const {
        const int first = first_column();
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            const int col = first + k * LOAD_COLS;
            weight[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (has_columns(k, a.d) && col < a.d) {
                asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(weight[k].x), "=f"(weight[k].y), "=f"(weight[k].z), "=f"(weight[k].w)
                             : "l"(norm + col));
            }
        }
    }

    // v = rmsnorm(x) for x = the embedding of token, or x_out; with signs, its signs to x_signs.
    __device__ __forceinline__ void normalise(
        const float4 (&weight)[VEC_LOADS], bool embed, uint32_t token, bool signs, float4 (&v)[VEC_LOADS]
    ) {
        const int first = first_column();
        float square = 0.0f;
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            const int col = first + k * LOAD_COLS;
            v[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (has_columns(k, a.d) && col < a.d) {
                v[k] = embed ? embedded(token, col) : __ldcg(reinterpret_cast<const float4*>(a.x_out + col));
            }
        }
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            square += fmaf(v[k].x, v[k].x, v[k].y * v[k].y) + fmaf(v[k].z, v[k].z, v[k].w * v[k].w);
        }
        const float scale = rsqrtf(block_sum<Computing>(square, scratch()) / a.d + a.eps);
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            v[k] = make_float4(
                v[k].x * scale * weight[k].x, v[k].y * scale * weight[k].y, v[k].z * scale * weight[k].z,
                v[k].w * scale * weight[k].w
            );
            if (signs && has_columns(k, a.d)) {
                // Eight lanes hold the 32 columns of a word.
                const uint32_t bits =
                    (v[k].x < 0.0f) | (v[k].y < 0.0f) << 1 | (v[k].z < 0.0f) << 2 | (v[k].w < 0.0f) << 3;
                uint32_t word = bits << lane_id() % 8 * 4;
                word |= __shfl_xor_sync(0xffffffffu, word, 1);
                word |= __shfl_xor_sync(0xffffffffu, word, 2);
                word |= __shfl_xor_sync(0xffffffffu, word, 4);
                const int col = first + k * LOAD_COLS;
                if (col < a.d && lane_id() % 8 == 0) {
                    x_signs()[col / WARP] = word;
                }
            }
        }
    }

    __device__ __forceinline__ float4 embedded(uint32_t token, int col) const {
        return four_of(static_cast<const T*>(a.embedding) + static_cast<int64_t>(token) * a.d + col);
    }

    // Rows first..end of the queries, keys and values, in the tile: rotated, to q and to the cache.
    __device__ __forceinline__ void store_qkv(const DecodeLayer& w, int position, int first, int end) {
        const int half = a.head_dim / 2;
#pragma unroll 1
        for (int i = threadIdx.x; i < (end - first) / 2; i += DECODE_THREADS) {
            const int pair = share(QKV).begin + first / 2 + i;
            int head = head_of(pair);
            const int dim = pair - head * half;
            float one = tile_row(2 * i);
            float two = tile_row(2 * i + 1);
            if (head < a.n_heads + a.n_kv_heads) {
                const float c = __ldg(a.cos + static_cast<int64_t>(position) * half + dim);
                const float sn = __ldg(a.sin + static_cast<int64_t>(position) * half + dim);
                const float rotated = fmaf(one, c, -(two * sn));
                two = fmaf(two, c, one * sn);
                one = rotated;
            }
            if (head < a.n_heads) {
                a.q[head * a.head_dim + dim] = one;
                a.q[head * a.head_dim + dim + half] = two;
            } else {
                head -= a.n_heads;
                CacheType* cache = static_cast<CacheType*>(w.keys);
                if (head >= a.n_kv_heads) {
                    head -= a.n_kv_heads;
                    cache = static_cast<CacheType*>(w.values);
                }
                cache += (static_cast<int64_t>(head) * a.n_positions_max + position) * a.head_dim + dim;
                from_f32(one, cache[0]);
                from_f32(two, cache[half]);
            }
        }
    }

    using CacheType = std::conditional_t<sizeof(T) == 4, float, __half>;
    static constexpr int KV_LOADS = KV_DIMS / PER_LOAD<CacheType>;

    // Keys and values of the positions of one round of a warp.
    struct Positions {
        uint4 keys[KV_IN_FLIGHT][KV_LOADS];
        uint4 values[KV_IN_FLIGHT][KV_LOADS];
    };

    // Loads those of the positions from first on, in steps of a round of the block, that lie in begin..end.
    __device__ __forceinline__ void load_positions(
        const DecodeLayer& w, int kv_head, int first, int begin, int end, Positions& p
    ) const {
        const int at_once = WARP / a.head_lanes;
        const int dim = lane_id() % a.head_lanes * KV_DIMS;
        int position = dim < a.head_dim ? first + warp_id() * at_once + lane_id() / a.head_lanes : end;
        const int64_t at = (static_cast<int64_t>(kv_head) * a.n_positions_max + position) * a.head_dim + dim;
        const CacheType* keys = static_cast<const CacheType*>(w.keys) + at;
        const CacheType* values = static_cast<const CacheType*>(w.values) + at;
        const int step = DECODE_WARPS * at_once;
#pragma unroll
        for (int j = 0; j < KV_IN_FLIGHT; j++) {
#pragma unroll
            for (int i = 0; i < KV_LOADS; i++) {
                if (position >= begin && position < end) {
                    p.keys[j][i] = __ldcg(reinterpret_cast<const uint4*>(keys) + i);
                    p.values[j][i] = __ldcg(reinterpret_cast<const uint4*>(values) + i);
                }
            }
            position += step;
            keys += step * a.head_dim;
            values += step * a.head_dim;
        }
    }

    __device__ __forceinline__ int n_splits(int n_positions) const {
        return min(a.n_splits_max, (n_positions + SPLIT_POSITIONS - 1) / SPLIT_POSITIONS);
    }

    // Waits for the grid in between: keys and values of earlier positions are asked for before.
    __device__ __forceinline__ void attention(int layer, int position) {
        const DecodeLayer& w = a.layers[layer];
        const int n_positions = position + 1;
        const int splits = n_splits(n_positions);
        const int chunk = (n_positions + splits - 1) / splits;
        const int group = a.n_heads / a.n_kv_heads;
        const int lanes = a.head_lanes;
        const int at_once = WARP / lanes;
        const int round = DECODE_WARPS * at_once * KV_IN_FLIGHT;
        const int dim = lane_id() % lanes * KV_DIMS;
        float* warp_sums = memory();                                             // (warps, head_dim)
        float* warp_maxima = memory() + DECODE_WARPS * a.head_lanes * KV_DIMS;  // (warps, 2)
        bool waited = false;
#pragma unroll 1
        for (int task = blockIdx.x; task < a.n_kv_heads * splits || !waited; task += gridDim.x) {
            const bool works = task < a.n_kv_heads * splits;
            const int kv_head = works ? task / splits : 0;
            const int split = task - kv_head * splits;
            const int begin = works ? split * chunk : 0;
            const int end = works ? min(begin + chunk, n_positions) : 0;
            if (!works) {
                wait();
                mark(WAIT_QKV);
                return;
            }
#pragma unroll 1
            for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                float q[KV_DIMS] = {};
                bool has_q = false;
                float sums[KV_DIMS] = {};
                float maximum = -INFINITY;
                float total = 0.0f;
#pragma unroll 1
                for (int first = begin; first < end; first += round) {
                    Positions p = {};
                    int from = first;
                    // Earlier positions before the wait, the token's own after it.
#pragma unroll 1
                    while (true) {
                        load_positions(w, kv_head, first, from, waited ? end : min(end, position), p);
                        if (waited) {
                            break;
                        }
                        wait();
                        mark(WAIT_QKV);
                        waited = true;
                        if (end <= position || first + round <= position) {
                            break;
                        }
                        from = position;
                    }
                    if (!has_q && dim < a.head_dim) {
#pragma unroll
                        for (int i = 0; i < KV_DIMS; i += 4) {
                            const float* from = a.q + head * a.head_dim + dim + i;
                            const float4 v = scaled(__ldcg(reinterpret_cast<const float4*>(from)), a.scale);
                            q[i] = v.x;
                            q[i + 1] = v.y;
                            q[i + 2] = v.z;
                            q[i + 3] = v.w;
                        }
                    }
                    has_q = true;
                    float scores[KV_IN_FLIGHT];
#pragma unroll
                    for (int j = 0; j < KV_IN_FLIGHT; j++) {
                        scores[j] = 0.0f;
#pragma unroll
                        for (int i = 0; i < KV_LOADS; i++) {
                            float k[PER_LOAD<CacheType>];
                            unpack<CacheType>(p.keys[j][i], k);
#pragma unroll
                            for (int e = 0; e < PER_LOAD<CacheType>; e++) {
                                scores[j] = fmaf(q[i * PER_LOAD<CacheType> + e], k[e], scores[j]);
                            }
                        }
                    }
                    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
                        for (int j = 0; j < KV_IN_FLIGHT; j++) {
                            scores[j] += __shfl_xor_sync(0xffffffffu, scores[j], offset);
                        }
                    }
                    float larger = maximum;
#pragma unroll
                    for (int j = 0; j < KV_IN_FLIGHT; j++) {
                        const int at = first + (j * DECODE_WARPS + warp_id()) * at_once + lane_id() / lanes;
                        scores[j] = at < end ? scores[j] : -INFINITY;
                        larger = fmaxf(larger, scores[j]);
                    }
                    const float factor = rescale(maximum, larger);
                    maximum = larger;
                    total = __fmul_rn(total, factor);
#pragma unroll
                    for (int i = 0; i < KV_DIMS; i++) {
                        sums[i] = __fmul_rn(sums[i], factor);
                    }
#pragma unroll
                    for (int j = 0; j < KV_IN_FLIGHT; j++) {
                        if (scores[j] == -INFINITY) {
                            continue;
                        }
                        const float weight = exp2f(scores[j] - larger);
                        total += weight;
#pragma unroll
                        for (int i = 0; i < KV_LOADS; i++) {
                            float v[PER_LOAD<CacheType>];
                            unpack<CacheType>(p.values[j][i], v);
#pragma unroll
                            for (int e = 0; e < PER_LOAD<CacheType>; e++) {
                                sums[i * PER_LOAD<CacheType> + e] =
                                    fmaf(weight, v[e], sums[i * PER_LOAD<CacheType> + e]);
                            }
                        }
                    }
                }
                // The positions that the lanes of a warp hold side by side, then the warps.
                float larger = maximum;
                for (int offset = lanes; offset < WARP; offset *= 2) {
                    larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, offset));
                }
                const float factor = rescale(maximum, larger);
                total = __fmul_rn(total, factor);
#pragma unroll
                for (int i = 0; i < KV_DIMS; i++) {
                    sums[i] = __fmul_rn(sums[i], factor);
                }
                for (int offset = lanes; offset < WARP; offset *= 2) {
                    total += __shfl_xor_sync(0xffffffffu, total, offset);
#pragma unroll
                    for (int i = 0; i < KV_DIMS; i++) {
                        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
                    }
                }
                if (lane_id() < lanes && dim < a.head_dim) {
#pragma unroll
                    for (int i = 0; i < KV_DIMS; i++) {
                        warp_sums[warp_id() * a.head_dim + dim + i] = sums[i];
                    }
                }
                if (lane_id() == 0) {
                    warp_maxima[2 * warp_id()] = larger;
                    warp_maxima[2 * warp_id() + 1] = total;
                }
                sync();
                for (int d = threadIdx.x; d < a.head_dim; d += DECODE_THREADS) {
                    float most = -INFINITY;
#pragma unroll
                    for (int warp = 0; warp < DECODE_WARPS; warp++) {
                        most = fmaxf(most, warp_maxima[2 * warp]);
                    }
                    float sum = 0.0f;
                    float all = 0.0f;
#pragma unroll
                    for (int warp = 0; warp < DECODE_WARPS; warp++) {
                        const float f = rescale(warp_maxima[2 * warp], most);
                        // A warp without positions left its sums zero.
                        sum = fmaf(f, warp_sums[warp * a.head_dim + d], sum);
                        all = fmaf(f, warp_maxima[2 * warp + 1], all);
                    }
                    const int64_t at = static_cast<int64_t>(head) * a.n_splits_max + split;
                    __stcg(a.part_sums + at * a.head_dim + d, sum);
                    if (d == 0) {
                        __stcg(a.part_maxima + 2 * at, most);
                        __stcg(a.part_maxima + 2 * at + 1, all);
                    }
                }
                sync();
            }
        }
    }

    // What each chunk of a head counts in the whole, (n_heads, splits) in the tile; parts are the chunks' maxima and totals,
    // of all threads. Ends past a barrier.
    __device__ __forceinline__ void weigh_splits(int splits, const float2* parts) const {
        sync();
#pragma unroll 1
        for (int i = threadIdx.x; i < a.n_heads * splits; i += DECODE_THREADS) {
            const float2* of_head = parts + i / splits * splits;
            float most = -INFINITY;
#pragma unroll 1
            for (int s = 0; s < splits; s++) {
                most = fmaxf(most, of_head[s].x);
            }
            float all = 0.0f;
#pragma unroll 1
            for (int s = 0; s < splits; s++) {
                all = fmaf(of_head[s].y, rescale(of_head[s].x, most), all);
            }
            tile()[i] = rescale(parts[i].x, most) / all;
        }
        sync();
    }

    // v = the chunks of attention, merged.
    __device__ __forceinline__ void merge_attention(int position, float4 (&v)[VEC_LOADS]) const {
        constexpr int COLS = VEC_LOADS < MERGE_COLS ? VEC_LOADS : MERGE_COLS;
        const int splits = n_splits(position + 1);
        const int first = first_column();
        // Behind the weights.
        float2* parts = reinterpret_cast<float2*>(tile()) + (a.n_heads * splits + 1) / 2;
#pragma unroll 1
        for (int i = threadIdx.x; i < a.n_heads * splits; i += DECODE_THREADS) {
            const int head = i / splits;
            const int part = head * a.n_splits_max + i - head * splits;
            parts[i] = __ldcg(reinterpret_cast<const float2*>(a.part_maxima) + part);
        }
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            v[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int base = 0; base < VEC_LOADS; base += COLS) {
#pragma unroll 1
            for (int from = 0; from < splits && has_columns(base, a.q_cols); from += MERGE_SPLITS) {
                float4 values[COLS][MERGE_SPLITS];
                int heads[COLS];
#pragma unroll
                for (int c = 0; c < COLS; c++) {
                    const int i = min(first + (base + c) * LOAD_COLS, a.q_cols - 4);
                    heads[c] = __float2int_rd((static_cast<float>(i) + 0.5f) * 0.5f * a.heads_per_pair);
                    const int at = (heads[c] * a.n_splits_max + from) * a.head_dim + i - heads[c] * a.head_dim;
#pragma unroll
                    for (int s = 0; s < MERGE_SPLITS; s++) {
                        values[c][s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                        if (base + c < VEC_LOADS && from + s < splits) {
                            values[c][s] = __ldcg(reinterpret_cast<const float4*>(a.part_sums + at + s * a.head_dim));
                        }
                    }
                }
                if (base == 0 && from == 0) {
                    weigh_splits(splits, parts);
                }
#pragma unroll
                for (int c = 0; c < COLS; c++) {
                    const float* weights = tile() + heads[c] * splits + from;
#pragma unroll
                    for (int s = 0; s < MERGE_SPLITS; s++) {
                        const float weight = from + s < splits ? weights[s] : 0.0f;
                        if (base + c < VEC_LOADS && first + (base + c) * LOAD_COLS < a.q_cols) {
                            float4& sum = v[base + c];
                            sum.x = fmaf(values[c][s].x, weight, sum.x);
                            sum.y = fmaf(values[c][s].y, weight, sum.y);
                            sum.z = fmaf(values[c][s].z, weight, sum.z);
                            sum.w = fmaf(values[c][s].w, weight, sum.w);
                        }
                    }
                }
            }
        }
        // Products go where the weights lie.
        sync();
    }

    // kept += the rows of lanes that keep theirs.
    __device__ __forceinline__ void keep_rows(bool keep, int row) const {
        const uint32_t keeping = __ballot_sync(0xffffffffu, keep);
        int at = 0;
        if (lane_id() == 0) {
            at = atomicAdd(&lists().n_kept, __popc(keeping));
        }
        at = __shfl_sync(0xffffffffu, at, 0);
        if (keep) {
            // The loading warp looks on.
            atomicExch(kept() + at + __popc(keeping & ((1u << lane_id()) - 1)), row);
        }
    }

    // The vector v of d columns in 8 bits to x_planes; returns its scale. Ends past a barrier.
    __device__ __forceinline__ float quantise_vec(const float4 (&v)[VEC_LOADS]) const {
        const int first = first_column();
        uint32_t largest = 0;
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            largest = max(largest, largest_of(v[k]));
        }
        // The norm's sum may still be read from the words before.
        uint32_t* words = reinterpret_cast<uint32_t*>(scratch() + DECODE_WARPS);
        const float scale = scale_of(block_max<Computing>(largest, words));
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            const int col = first + k * LOAD_COLS;
            if (has_columns(k, a.d) && col < x_planes_steps(n_words()) * STEP_WORDS * WARP) {
                store_planes(x_planes(), col, v[k], scale);
            }
        }
        sync();
        return scale;
    }

    // kept = the block's rows of which keeps(row, slot, limit) is true, ROWS of a warp side by side, the warps on as many
    // units as they make. Lanes that share a row call it alike; its planes lie in the ring from slot on.
    template <int ROWS, typename Keeps>
    __device__ __forceinline__ void predict(const DecodeLayer& w, int n_planes, const Keeps& keeps) {
        constexpr int LANES = WARP / ROWS;
        constexpr int GROUPS = UNIT_ROWS / ROWS;
        const auto mine = share(MLP);
        const int n_units = (mine.count + UNIT_ROWS - 1) / UNIT_ROWS;
        constexpr int N_AT_ONCE = DECODE_WARPS / GROUPS;
        const int n_at_once = a.ringed_signs ? min(N_AT_ONCE, a.n_slots / n_planes) : N_AT_ONCE;
        // Else a warp that reads nothing of a unit could pass its slot twice.
        const bool has_room = n_units * n_planes <= a.n_slots;
        const int of_warp = warp_id() / GROUPS;
#pragma unroll 1
        for (int unit = 0; unit < n_units; unit += n_at_once) {
            const int first = unit * UNIT_ROWS + warp_id() * ROWS;
            if (of_warp < n_at_once && first < mine.count) {
                const int row = first + lane_id() / LANES;
                // The last row stands in for those that are not there.
                const int there = min(row, mine.count - 1);
                const bool keep = keeps(there, of_warp * n_planes, limit_of(w.limits, w.limit, mine.begin + there));
                keep_rows(lane_id() % LANES == 0 && row < mine.count && keep, row);
            }
            if (a.ringed_signs) {
                ring.pass(min(n_at_once, n_units - unit) * n_planes);
                if (!has_room) {
                    sync();
                }
            }
        }
    }

    // The words of a row of the block in its unit, in a slot of the ring.
    __device__ __forceinline__ const uint4* words_of(int row, int slot) const {
        return reinterpret_cast<const uint4*>(ring.arrived(slot)) + row % UNIT_ROWS * (n_words() / 4);
    }

    // kept = the block's rows whose signs differ from those of the vector in no more places than their limit.
    __device__ __forceinline__ void predict_signs(const DecodeLayer& w) {
        constexpr int LANES = WARP / SIGN_ROWS;
        const int begin = share(MLP).begin;
        predict<SIGN_ROWS>(w, 1, [&](int row, int slot, uint32_t limit) {
            uint32_t differ = 0;
            if (a.ringed_signs) {
                const uint4* words = words_of(row, slot);
                const uint4* x = reinterpret_cast<const uint4*>(x_signs());
#pragma unroll 4
                for (int i = lane_id() % LANES; i < n_words() / 4; i += LANES) {
                    differ += n_differ(words[i], x[i]);
                }
            } else {
                const uint32_t* words = bit_rows(w).row(0, begin + row);
#pragma unroll 4
                for (int i = lane_id() % LANES; i < n_words(); i += LANES) {
                    differ += __popc(__ldg(words + i) ^ x_signs()[i]);
                }
            }
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2) {
                differ += __shfl_xor_sync(0xffffffffu, differ, offset);
            }
            return differ <= limit;
        });
    }

    // kept = the block's rows whose score for the vector v passes the threshold.
    __device__ __forceinline__ void predict_scores(const DecodeLayer& w, const float4 (&v)[VEC_LOADS]) {
        const float x_scale = quantise_vec(v);
        const BitRows bits = bit_rows(w);
        const int begin = share(MLP).begin;
        predict<SCORE_ROWS>(w, bits.n_planes, [&](int row, int slot, uint32_t limit) {
            if (!a.ringed_signs) {
                return is_kept(bits.score(begin + row, x_planes()), limit, x_scale);
            }
            ScoreCounts counts;
#pragma unroll 1
            for (int plane = 0; plane < bits.n_planes; plane++) {
                const uint4* words = words_of(row, slot + plane);
                counts.add_plane(bits.n_words, x_planes(), [&](int word) { return words[word / 4]; });
            }
            return is_kept(counts.score(), limit, x_scale);
        });
    }

    // kept = the block's rows whose score of low rank for the vector v passes the threshold. The rows of the first factor
    // are dealt to the blocks of the grid, which then waits for all of their products.
    __device__ __forceinline__ void predict_low_rank(const DecodeLayer& w, const float4 (&v)[VEC_LOADS]) {
        const LowRank& factors = w.factors;
        const auto mine = share(MLP);
        const int first_col = first_column();
#pragma unroll 1
        for (int k = blockIdx.x; k < factors.rank; k += gridDim.x) {
            const __half* row = factors.fc1 + static_cast<int64_t>(k) * a.d + first_col;
            float4 weights[VEC_LOADS];
#pragma unroll
            for (int i = 0; i < VEC_LOADS; i++) {
                const bool in = has_columns(i, a.d) && first_col + i * LOAD_COLS < a.d;
                weights[i] = in ? four_of(row + i * LOAD_COLS) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            sync();
#pragma unroll
            for (int i = 0; i < VEC_LOADS; i++) {
                if (has_columns(i, a.d) && first_col + i * LOAD_COLS < a.d) {
                    *reinterpret_cast<float4*>(tile() + first_col + i * LOAD_COLS) = products(weights[i], v[i]);
                }
            }
            sync();
            float* sums = tile() + a.d;
#pragma unroll 1
            for (int segment = warp_id(); segment < n_segments(a.d); segment += DECODE_WARPS) {
                sums[segment * DOT_CHAINS + lane_id()] =
                    segment_sum(segment, a.d, [&](int, int col) { return tile()[col]; });
            }
            sync();
            if (warp_id() == 0) {
                const float dot = add_segments(sums, n_segments(a.d));
                if (lane_id() == 0) {
                    __stcg(a.inner + k, inner_of(dot, factors.relu));
                }
            }
        }
        arrive();
        const float x_scale = factors.scales != nullptr ? quantise_vec(v) : 0.0f;
        wait();
#pragma unroll 1
        for (int k = threadIdx.x; k < factors.rank; k += DECODE_THREADS) {
            tile()[k] = __ldcg(a.inner + k);
        }
        sync();
#pragma unroll 1
        for (int first = warp_id() * SCORE_ROWS; first < mine.count; first += DECODE_WARPS * SCORE_ROWS) {
            const int row = mine.begin + min(first + lane_id() / 4, mine.count - 1);
            const uint32_t threshold = limit_of(w.limits, w.limit, row);
            const bool keep = keeps_low_rank(factors, bit_rows(w), row, tile(), x_planes(), x_scale, threshold);
            keep_rows(lane_id() % 4 == 0 && first + lane_id() / 4 < mine.count && keep, first + lane_id() / 4);
        }
    }

    // Empties the lists of rows; needs a barrier of the block, and the loading warp past the last lists.
    __device__ __forceinline__ void clear_lists(const DecodeLayer& w) {
        const int n = share(MLP).count;
        if (threadIdx.x == 0) {
            lists().n_kept = w.rows == PREDICTED ? 0 : n;
            lists().n_active = 0;
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += DECODE_THREADS) {
            h_rows()[i] = 0.0f;
            kept()[i] = NOT_LISTED;
            found()[i] = NOT_LISTED;
        }
    }

    __device__ __forceinline__ void count_rows(int layer) const {
        if (threadIdx.x == 0) {
            atomicAdd(a.counts + 2 * layer, static_cast<unsigned long long>(lists().n_kept));
            atomicAdd(a.counts + 2 * layer + 1, static_cast<unsigned long long>(lists().n_active));
        }
    }

    // mlp_x of the layer, of which every block has all: block 0 writes it.
    __device__ __forceinline__ void export_input(int layer, const float4 (&v)[VEC_LOADS]) const {
        if (ANY && a.mlp_x != nullptr && blockIdx.x == 0) {
            const int first = first_column();
            float* to = a.mlp_x + static_cast<int64_t>(layer) * a.d + first;
#pragma unroll
            for (int k = 0; k < VEC_LOADS; k++) {
                if (has_columns(k, a.d) && first + k * LOAD_COLS < a.d) {
                    *reinterpret_cast<float4*>(to + k * LOAD_COLS) = v[k];
                }
            }
        }
    }

    // mlp_h and mlp_skip of the block's rows, while the lists are whole.
    __device__ __forceinline__ void export_rows(const DecodeLayer& w, int layer) const {
        if (ANY && a.mlp_h != nullptr) {
            const auto mine = share(MLP);
            const int64_t at = static_cast<int64_t>(layer) * a.n_rows + mine.begin;
            const bool predicts = w.rows == PREDICTED;
#pragma unroll 1
            for (int i = threadIdx.x; i < mine.count; i += DECODE_THREADS) {
                a.mlp_h[at + i] = h_rows()[i];
                a.mlp_skip[at + i] = predicts;
            }
            sync();
#pragma unroll 1
            for (int i = threadIdx.x; predicts && i < lists().n_kept; i += DECODE_THREADS) {
                a.mlp_skip[at + kept()[i]] = 0;
            }
        }
    }

    // The block's rows whose gate is not zero, in order. Ends past a barrier of the block.
    __device__ __forceinline__ void list_active() {
        if (warp_id() == 0) {
            int n = 0;
#pragma unroll 1
            for (int base = 0; base < share(MLP).count; base += WARP) {
                const int i = base + lane_id();
                const bool is_active = i < share(MLP).count && h_rows()[i] != 0.0f;
                const uint32_t those = __ballot_sync(0xffffffffu, is_active);
                if (is_active) {
                    active()[n + __popc(those & ((1u << lane_id()) - 1))] = i;
                }
                n += __popc(those);
            }
        }
        sync();
        if (ALL_ARRIVE || threadIdx.x == 0) {
            arrive_at(&lists().has_active);
        }
    }

    // kept = the block's rows that the predictor keeps for the vector v; the loading warp brings them. Ends past a barrier
    // of the block.
    __device__ __forceinline__ void list_kept(const DecodeLayer& w, const float4 (&v)[VEC_LOADS]) {
        if (ANY && w.factors.rank > 0) {
            predict_low_rank(w, v);
        } else if (w.n_planes > 0) {
            predict_scores(w, v);
        } else {
            sync();
            predict_signs(w);
        }
        sync();
        if (ALL_ARRIVE || threadIdx.x == 0) {
            arrive_at(&lists().has_kept);
        }
        mark(PREDICT);
    }

    // Gates of the block's rows first..end, kept or all, or gates and ups in turn, from the tile.
    __device__ __forceinline__ void store_gates(const DecodeLayer& w, int first, int end) {
        if (w.rows == ALL) {
#pragma unroll 1
            for (int i = threadIdx.x; i < (end - first) / 2; i += DECODE_THREADS) {
                const float gate = activate(a.activation, a.threshold, tile_row(2 * i));
                h_rows()[first / 2 + i] = gate * tile_row(2 * i + 1);
                if (gate != 0.0f) {
                    atomicAdd(&lists().n_active, 1);
                }
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < end - first; i += DECODE_THREADS) {
                const int row = w.rows == PREDICTED ? kept()[first + i] : first + i;
                const float gate = activate(a.activation, a.threshold, tile_row(i));
                h_rows()[row] = gate;
                if (gate != 0.0f) {
                    atomicExch(found() + atomicAdd(&lists().n_active, 1), row);
                }
            }
        }
    }

    // down_parts[block] = sum over the block's rows of h[i] * w_down_t[i]: a warp for its own chunks of columns.
    __device__ __forceinline__ void down(const DecodeLayer& w) {
        const int n = w.rows == ALL ? share(MLP).count : lists().n_active;
        const int first_col = first_column();
        float4 sums[VEC_LOADS];
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            sums[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll 1
        for (int first = 0; first < n; first += a.product_rows) {
            const int n_rows = min(a.product_rows, n - first);
            float h_of_lane = 0.0f;
            if (lane_id() < n_rows) {
                h_of_lane = h_rows()[w.rows == ALL ? first + lane_id() : active()[first + lane_id()]];
            }
#pragma unroll 1
            for (int r = 0; r < n_rows; r++) {
                ring.arrived(r);
            }
#pragma unroll 1
            for (int begin = 0; begin < n_rows; begin += DOWN_ROWS) {
                const T* row[DOWN_ROWS];
                float h[DOWN_ROWS];
#pragma unroll
                for (int r = 0; r < DOWN_ROWS; r++) {
                    // The last row stands in for those that are not there, with zeros.
                    row[r] = reinterpret_cast<const T*>(ring.row(min(begin + r, n_rows - 1))) + first_col;
                    h[r] = __shfl_sync(0xffffffffu, h_of_lane, begin + r);
                }
#pragma unroll
                for (int k = 0; k < VEC_LOADS; k++) {
                    if (has_columns(k, a.d) && first_col + k * LOAD_COLS < a.d) {
#pragma unroll
                        for (int r = 0; r < DOWN_ROWS; r++) {
                            const float4 v = four_of(row[r] + k * LOAD_COLS);
                            sums[k].x = fmaf(h[r], v.x, sums[k].x);
                            sums[k].y = fmaf(h[r], v.y, sums[k].y);
                            sums[k].z = fmaf(h[r], v.z, sums[k].z);
                            sums[k].w = fmaf(h[r], v.w, sums[k].w);
                        }
                    }
                }
            }
            ring.pass(n_rows);
        }
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            if (has_columns(k, a.d) && first_col + k * LOAD_COLS < a.d) {
                float* to = a.down_parts + static_cast<int64_t>(blockIdx.x) * a.d + first_col + k * LOAD_COLS;
                __stcg(reinterpret_cast<float4*>(to), sums[k]);
            }
        }
    }

    // x_out and own_x of the block's columns: what they were and the parts of all blocks.
    __device__ __forceinline__ void add_parts() {
        const auto mine = share(OUT);
#pragma unroll 1
        for (int base = 0; base < mine.count; base += WARP) {
            const int col = base + lane_id();
            float sum = 0.0f;
#pragma unroll 1
            for (int first = warp_id(); first < gridDim.x; first += ADD_PARTS * DECODE_WARPS) {
                const float* from = a.down_parts + static_cast<int64_t>(first) * a.d + mine.begin + col;
                float parts[ADD_PARTS];
#pragma unroll
                for (int i = 0; i < ADD_PARTS; i++) {
                    const bool in = col < mine.count && first + i * DECODE_WARPS < gridDim.x;
                    parts[i] = in ? __ldcg(from + static_cast<int64_t>(i * DECODE_WARPS) * a.d) : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < ADD_PARTS; i++) {
                    sum += parts[i];
                }
            }
            tile()[lane_id() * DECODE_WARPS + warp_id()] = sum;
            sync();
            if (warp_id() == 0 && col < mine.count) {
                const float x = own_x()[col] + tile_row(lane_id());
                own_x()[col] = x;
                __stcg(a.x_out + mine.begin + col, x);
            }
            sync();
        }
    }

    // The larger logit, the smaller id among equals.
    static __device__ __forceinline__ void keep_better(float& best, int& id, float other, int other_id) {
        if (other > best || (other == best && other_id < id)) {
            best = other;
            id = other_id;
        }
    }

    // The best of a block on thread 0.
    __device__ __forceinline__ void block_best(float& best, int& id) {
        int* ids = reinterpret_cast<int*>(memory());
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, best, offset);
            keep_better(best, id, other, __shfl_xor_sync(0xffffffffu, id, offset));
        }
        if (lane_id() == 0) {
            scratch()[warp_id()] = best;
            ids[warp_id()] = id;
        }
        sync();
        if (threadIdx.x == 0) {
            for (int warp = 1; warp < DECODE_WARPS; warp++) {
                keep_better(best, id, scratch()[warp], ids[warp]);
            }
        }
    }

    // Block 0: the state of the next token.
    __device__ __forceinline__ void finish(uint32_t token, int position) {
        if (a.greedy) {
            float best = -INFINITY;
            int id = INT_MAX;
            for (int block = threadIdx.x; block < gridDim.x; block += DECODE_THREADS) {
                const float other = __uint_as_float(__ldcg(a.best + 2 * block));
                keep_better(best, id, other, static_cast<int>(__ldcg(a.best + 2 * block + 1)));
            }
            block_best(best, id);
            token = id;
        }
        if (threadIdx.x == 0) {
            if (position < a.n_ids) {
                a.ids[position] = token;
            }
            a.state->token = token;
            a.state->position = position + 1;
            a.sync[1] = arrivals_before + barriers * gridDim.x;
        }
    }
};

template <typename T, int VEC_LOADS, bool ANY>
__device__ __forceinline__ void decode(const DecodeArgs& a) {
    using Computer = Decoder<T, VEC_LOADS, ANY>;
    const Layout<T> layout{a};
    auto& lists = layout.lists();
    init_ring(a.n_slots, DECODE_WARPS);
    if (threadIdx.x == 0) {
        init_barrier(&lists.has_kept, arrivals(DECODE_THREADS));
        init_barrier(&lists.has_active, arrivals(DECODE_THREADS));
        init_barrier(&lists.has_phase, 1);
        init_barrier(&lists.may_load, arrivals(DECODE_THREADS));
    }
    layout.make_shares();
    __syncthreads();
    if (warp_id() >= DECODE_WARPS) {
        leave_registers();
        if (warp_id() > DECODE_WARPS) {
            return;
        }
        Loader<T, ANY>{layout, {layout.ring_room(), a.in_flight, a.in_flight_idle}}.token();
        return;
    }
    take_registers();

    Computer m(layout);
    const uint32_t token = min(__ldcg(&a.state->token), static_cast<uint32_t>(a.vocab_size - 1));
    const int position = static_cast<int>(min(__ldcg(&a.state->position), static_cast<uint32_t>(a.n_positions_max - 1)));
    m.arrivals_before = __ldcg(a.sync + 1);
    m.start_marks();
    const auto own = m.share(OUT);
#pragma unroll 1
    for (int i = threadIdx.x; i < own.count; i += DECODE_THREADS) {
        m.own_x()[i] = to_f32(static_cast<const T*>(a.embedding)[static_cast<int64_t>(token) * a.d + own.begin + i]);
    }

    float best = -INFINITY;
    int id = INT_MAX;
    int phase = QKV;
    int layer = 0;
    // One loop over all that the ring brings, so that code is there once: instructions come from a cache, too.
#pragma unroll 1
    while (true) {
        const DecodeLayer& w = a.layers[min(layer, a.n_layers - 1)];
        const int n_cols = phase == OUT ? a.q_cols : a.d;
        const bool predicts = phase == MLP && w.rows == PREDICTED;
        const bool lists_rows = phase == MLP && w.rows != ALL;
        int n = phase == UP_ROWS ? lists.n_active : m.share(phase).count;
        if (phase == QKV || (phase == MLP && w.rows == ALL)) {
            n *= 2;
        }
        int n_held = 0;
        if (phase == OUT) {
            // Waits, when it has asked for the keys and values that are there already.
            m.attention(layer, position);
            m.arrive();
            m.mark(ATTEND);
        }
        if (phase != UP_ROWS) {
            // The first rows go into registers before the vector is there, so that the ring has room for more.
            typename Computer::HeldRows rows;
            n_held = m.holds(n_cols) && !predicts ? min(a.product_rows, n) : 0;
            m.hold_rows(n_cols, n_held, rows);
            float4 weight[VEC_LOADS];
            m.load_norm(phase == HEAD ? a.final_norm : phase == MLP ? w.mlp_norm : w.attn_norm, weight);
            if (m.barriers > 0) {
                m.wait(lists_rows);
                m.mark(phase == OUT ? WAIT_ATTEND : phase == MLP ? WAIT_OUT : WAIT_X);
            }
            float4 v[VEC_LOADS];
            if (phase == OUT) {
                m.merge_attention(position, v);
            } else {
                m.normalise(weight, layer == 0 && phase == QKV, token, predicts && w.n_planes == 0, v);
                if (phase == MLP) {
                    m.export_input(layer, v);
                }
            }
            m.store_vec(n_cols, v);
            if constexpr (sizeof(T) == 2) {
                if (n_held > 0) {
                    m.store_sums(m.vec(n_cols).template held_product<DECODE_WARPS>(rows, warp_id()), 0, n_held);
                }
            }
            m.mark(phase == QKV ? NORM_QKV : phase == OUT ? MERGE : phase == MLP ? NORM_MLP : NORM_HEAD);
            if (threadIdx.x == 0) {
                arrive_at(&lists.has_phase);
            }
            if (predicts) {
                m.list_kept(w, v);
                n = lists.n_kept;
            }
        }
        // Kept rows a product at a time, as the loading warp waits for those that are active.
        const int tile_rows = lists_rows ? a.product_rows : a.tile_rows;
#pragma unroll 1
        for (int first = 0; first < n; first += tile_rows) {
            const int end = min(first + tile_rows, n);
            m.multiply_rows(n_cols, n_held, end - first);
            n_held = 0;
            Computing::sync();
            if (phase == QKV) {
                m.store_qkv(w, position, first, end);
            } else if (phase == MLP) {
                m.store_gates(w, first, end);
            } else {
#pragma unroll 1
                for (int i = threadIdx.x; i < end - first; i += DECODE_THREADS) {
                    const float sum = m.tile_row(i);
                    if (phase == OUT) {
                        const float x = m.own_x()[first + i] + sum;
                        m.own_x()[first + i] = x;
                        __stcg(a.x_out + own.begin + first + i, x);
                    } else if (phase == UP_ROWS) {
                        m.h_rows()[m.found()[first + i]] *= sum;
                    } else {
                        const int row = m.share(HEAD).begin + first + i;
                        a.logits[row] = sum;
                        m.keep_better(best, id, sum, row);
                    }
                }
            }
            Computing::sync();
        }
        if (phase == HEAD) {
            m.mark(ROWS_HEAD);
            break;
        }
        if (phase == QKV) {
            m.mark(ROWS_QKV);
            m.arrive();
            phase = OUT;
            continue;
        }
        if (phase == OUT) {
            m.mark(ROWS_OUT);
            m.clear_lists(w);
            m.arrive();
            phase = MLP;
            continue;
        }
        if (phase == MLP && w.rows != ALL) {
            m.list_active();
            m.mark(w.rows == PREDICTED ? GATE : ROWS_MLP);
            phase = UP_ROWS;
            continue;
        }
        m.mark(phase == MLP ? ROWS_MLP : UP);
        m.down(w);
        m.arrive();
        m.count_rows(layer);
        m.export_rows(w, layer);
        m.mark(DOWN);
        layer++;
        m.wait();
        m.mark(WAIT_DOWN);
        m.add_parts();
        m.arrive();
        m.mark(ADD_DOWN);
        phase = layer < a.n_layers ? QKV : HEAD;
    }
    if (a.greedy) {
        m.block_best(best, id);
        if (threadIdx.x == 0) {
            __stcg(a.best + 2 * blockIdx.x, __float_as_uint(best));
            __stcg(a.best + 2 * blockIdx.x + 1, static_cast<uint32_t>(id));
        }
        m.arrive();
    }
    if (blockIdx.x == 0) {
        if (a.greedy) {
            m.wait();
        }
        m.finish(token, position);
    }
    m.mark(FINISH);
    m.store_marks();
}

// decode_TYPE_N: vectors of at most 1024 N columns. f32 is not for speed and has one.
#define DECODE(NAME, T, VEC_LOADS, ANY)                                          \
    extern "C" __global__ __launch_bounds__(DECODE_BLOCK, 1) void decode_##NAME( \
        const __grid_constant__ DecodeArgs a                                     \
    ) {                                                                          \
        decode<T, VEC_LOADS, ANY>(a);                                            \
    }
DECODE(f32_8, float, 8, false)
DECODE(f16_1, __half, 1, false)
DECODE(f16_2, __half, 2, false)
DECODE(f16_4, __half, 4, false)
DECODE(f16_5, __half, 5, false)
DECODE(f16_8, __half, 8, false)
DECODE(bf16_1, __nv_bfloat16, 1, false)
DECODE(bf16_2, __nv_bfloat16, 2, false)
DECODE(bf16_4, __nv_bfloat16, 4, false)
DECODE(bf16_5, __nv_bfloat16, 5, false)
DECODE(bf16_8, __nv_bfloat16, 8, false)
// decode_TYPE_any: layers may have factors, the MLP may be traced; vectors of any width.
DECODE(f32_any, float, 8, true)
DECODE(f16_any, __half, 8, true)
DECODE(bf16_any, __nv_bfloat16, 8, true)
