//! The CPU backend: instruction set chosen once, threads that persist, safe operations over checked shapes.

mod attention;
mod decode;
mod descend;
mod elementwise;
mod gemm;
mod lanes;
mod low_rank;
mod pool;
#[cfg(target_arch = "x86_64")]
mod score_batch;
mod scores;
mod signs;

pub use descend::{Moments, Sweeps};

use std::sync::{Mutex, PoisonError};

use crate::shape::check;
use crate::{
    Activation, AttentionShape, BitPlanes, Elements, Limits, LowRank, Matrix, Matvec, MlpAudit, MlpCounts,
    MlpWeights, PLANES_MAX, Residual, Rows, ShapeError, SignMatrix, Thresholds,
};

/// Instruction set of the vector paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// No intrinsics: what the compiler makes of plain Rust.
    Portable,
    /// AVX2, FMA, F16C, POPCNT.
    Avx2,
    /// AVX-512 F, BW, VL, VPOPCNTDQ, VNNI.
    Avx512,
}

impl Isa {
    /// All of them, narrowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// `portable`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The instruction set that [`Isa::name`] calls so.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// The widest one of this processor.
    #[cfg(target_arch = "x86_64")]
    pub fn detect() -> Self {
        // The names have to cover every `target_feature` of the entries in this module's files.
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vpopcntdq")
            && is_x86_feature_detected!("avx512vnni");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    /// The widest one of this processor.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn detect() -> Self {
        Self::Portable
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A CPU with its worker threads. Operations run on the calling thread and the workers together; results do not
/// depend on the number of threads, bit for bit.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: pool::Pool,
    gemm: gemm::GemmScratch,
}

/// Buffers of [`Cpu::mlp`], made once per session.
#[derive(Debug)]
pub struct MlpScratch {
    decode: decode::Scratch,
}

impl MlpScratch {
    /// For an MLP of `intermediate_size` neurons over `hidden_size` inputs.
    pub fn new(intermediate_size: usize, hidden_size: usize) -> Self {
        Self { decode: decode::Scratch::new(intermediate_size, hidden_size) }
    }
}

/// Buffers of [`Cpu::attention`], made once per session.
#[derive(Debug)]
pub struct AttentionScratch {
    attention: attention::Scratch,
}

impl AttentionScratch {
    /// For calls of `shape`.
    pub fn new(shape: &AttentionShape) -> Self {
        Self { attention: attention::Scratch::new(shape) }
    }
}

impl Cpu {
    /// The widest instruction set of this processor with `n_threads` threads (0: one for each available core).
    /// The environment variable `SINF_ISA` (`portable`, `avx2`, `avx512`) lowers it; what it
    /// cannot name or the processor lacks is not used, so report [`Cpu::isa`].
    pub fn new(n_threads: usize) -> Self {
        let asked = std::env::var("SINF_ISA").ok().and_then(|name| Isa::from_name(&name));
        Self::with_isa(n_threads, asked.unwrap_or(Isa::Avx512))
    }

    /// As [`Cpu::new`], with `isa` or the widest one below it that this processor has.
    pub fn with_isa(n_threads: usize, isa: Isa) -> Self {
        let n_threads = if n_threads == 0 {
            std::thread::available_parallelism().map_or(1, usize::from)
        } else {
            n_threads
        };
        let pool = pool::Pool::new(n_threads);
        Self { isa: isa.min(Isa::detect()), gemm: gemm::GemmScratch::new(pool.n_threads()), pool }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// Calls `f` with each of `items`, in any order and on any of the threads.
    ///
    /// # Panics
    /// With the panic of `f`.
    pub fn for_each<I: Iterator<Item: Send> + Send>(&self, items: I, f: impl Fn(I::Item) + Sync) {
        let items = Mutex::new(items);
        let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
        self.pool.run(self.n_threads(), &|_| {
            while let Some(item) = next() {
                f(item);
            }
        });
    }

    /// `out = w[row]` as f32.
    pub fn row(&self, w: &Matrix<'_>, row: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        check_matrix(w)?;
        check("row width", w.n_cols, out.len())?;
        check("row", row.min(w.n_rows.saturating_sub(1)), row)?;
        elementwise::row(self.isa, w, row, out);
        Ok(())
    }

    /// RMSNorm of each row of `x (n_tokens, width)`; `weight (width,)`, `out` as `x`.
    pub fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<(), ShapeError> {
        check("rmsnorm output", x.len(), out.len())?;
        let width = weight.len();
        if x.is_empty() {
            return Ok(());
        }
        check("rmsnorm input", x.len().checked_div(width).unwrap_or(0) * width, x.len())?;
        let n_tokens = x.len() / width;
        let out = pool::Shared::new(out);
        self.pool.run(n_tokens.div_ceil(TOKENS), &|chunk| {
            for token in chunk * TOKENS..n_tokens.min((chunk + 1) * TOKENS) {
                // SAFETY: each token is normalised once.
                let out = unsafe { out.slice(token * width, width) };
                elementwise::rmsnorm(self.isa, &x[token * width..][..width], weight, eps, out);
            }
        });
        Ok(())
    }

    /// Rotates every head of `heads (n_tokens, n_heads, head_dim)`; `cos`, `sin` `(n_tokens, head_dim / 2)`.
    pub fn rope(
        &self,
        heads: &mut [f32],
        n_heads: usize,
        head_dim: usize,
        cos: &[f32],
        sin: &[f32],
    ) -> Result<(), ShapeError> {
        let (width, half) = (n_heads * head_dim, head_dim / 2);
        if heads.is_empty() {
            return Ok(());
        }
        let n_tokens = heads.len().checked_div(width).unwrap_or(0);
        check("rope heads", n_tokens * width, heads.len())?;
        check("rope head_dim", 2 * half, head_dim)?;
        check("rope cosines", n_tokens * half, cos.len())?;
        check("rope sines", n_tokens * half, sin.len())?;
        let heads = pool::Shared::new(heads);
        self.pool.run(n_tokens.div_ceil(TOKENS), &|chunk| {
            for token in chunk * TOKENS..n_tokens.min((chunk + 1) * TOKENS) {
                // SAFETY: each token is rotated once.
                let heads = unsafe { heads.slice(token * width, width) };
                let angles = token * half..(token + 1) * half;
                elementwise::rope(self.isa, heads, &cos[angles.clone()], &sin[angles]);
            }
        });
        Ok(())
    }

    /// Several products with the same `x` in one dispatch (q, k and v; or one alone).
    pub fn matvec(&self, x: &[f32], jobs: &mut [Matvec<'_>]) -> Result<(), ShapeError> {
        for job in jobs.iter() {
            check_matrix(&job.w)?;
            check("matvec input", job.w.n_cols, x.len())?;
            check("matvec output", job.w.n_rows, job.y.len())?;
        }
        decode::matvec(self.isa, &self.pool, x, jobs);
        Ok(())
    }

    /// `y (+)= X Wᵀ` for `n_tokens` rows. Shapes: `x (n_tokens, n_cols)`, `y (n_tokens, n_rows)`.
    pub fn matmul(
        &self,
        w: &Matrix<'_>,
        n_tokens: usize,
        x: &[f32],
        y: &mut [f32],
        accumulate: bool,
    ) -> Result<(), ShapeError> {
        check("matmul input", n_tokens * w.n_cols, x.len())?;
        check("matmul output", n_tokens * w.n_rows, y.len())?;
        self.gemm.matmul(self.isa, &self.pool, gemm::Product { w, n_tokens, x, y, accumulate });
        Ok(())
    }

    /// `y (+)= X W` with `w_t (n_rows, n_cols)` stored transposed. Shapes: `x (n_tokens, n_rows)`,
    /// `y (n_tokens, n_cols)`.
    pub fn matmul_t(
        &self,
        w_t: &Matrix<'_>,
        n_tokens: usize,
        x: &[f32],
        y: &mut [f32],
        accumulate: bool,
    ) -> Result<(), ShapeError> {
        check("matmul_t input", n_tokens * w_t.n_rows, x.len())?;
        check("matmul_t output", n_tokens * w_t.n_cols, y.len())?;
        self.gemm.matmul_t(self.isa, &self.pool, gemm::Product { w: w_t, n_tokens, x, y, accumulate });
        Ok(())
    }

    /// Moves the odd numbers `v` of a few bits, which stand for `w` and have its signs, element by element to where the
    /// error `(w - a v)^T H (w - a v)` of their row is the least, with `a = v^T H w / v^T H v` and H the moments; `p` is
    /// `w H`, and `q`, which follows, `v H`. Shapes: all `(n_rows, n_cols)`.
    pub fn descend(
        &self,
        moments: &Moments,
        sweeps: Sweeps,
        w: &[f32],
        v: &mut [f32],
        p: &[f32],
        q: &mut [f32],
    ) -> Result<(), ShapeError> {
        let n_cols = moments.n_cols();
        check("columns of rows that move", w.len().checked_div(n_cols).unwrap_or(0) * n_cols, w.len())?;
        check("numbers of rows that move", w.len(), v.len())?;
        check("moments of rows", w.len(), p.len())?;
        check("moments of numbers", w.len(), q.len())?;
        descend::descend(self.isa, &self.pool, moments, sweeps, descend::Chunk { w, v, p, q });
        Ok(())
    }

    /// Causal attention of `n_tokens` consecutive positions, the first at `first_position`; the cache already holds
    /// their keys and values. Shapes: `q` and `out` `(n_tokens, n_heads, head_dim)`.
    #[expect(clippy::too_many_arguments, reason = "a call of the equation, each argument one of its terms")]
    pub fn attention(
        &self,
        shape: &AttentionShape,
        n_tokens: usize,
        first_position: usize,
        q: &[f32],
        k: Elements<'_>,
        v: Elements<'_>,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let width = shape.n_heads * shape.head_dim;
        check("attention queries", n_tokens * width, q.len())?;
        check("attention output", n_tokens * width, out.len())?;
        let n_cached = shape.n_kv_heads * shape.n_positions_max * shape.head_dim;
        check("attention keys", n_cached, k.len())?;
        check("attention values", n_cached, v.len())?;
        let n_positions = first_position + n_tokens;
        check("attention positions", n_positions.min(shape.n_positions_max), n_positions)?;
        if n_tokens * width == 0 {
            return Ok(());
        }
        check(
            "query heads of a key/value head",
            0,
            shape.n_heads.checked_rem(shape.n_kv_heads).unwrap_or(1),
        )?;
        let wanted = attention::Scratch::sizes_for(shape);
        let found = scratch.attention.sizes();
        check("attention scratch", wanted.0, found.0.min(wanted.0))?;
        check("attention scratch", wanted.1, found.1.min(wanted.1))?;
        attention::attention(
            self.isa,
            &self.pool,
            shape,
            n_tokens,
            first_position,
            q,
            k,
            v,
            &mut scratch.attention,
            out,
        );
        Ok(())
    }

    /// One token's MLP: `y += W_down (act(W_gate x) * (W_up x))` over the rows that `rows` selects.
    /// Shapes: `x (hidden_size,)`, `y (hidden_size,)`.
    pub fn mlp(
        &self,
        w: &MlpWeights<'_>,
        rows: &Rows<'_>,
        activation: Activation,
        x: &[f32],
        scratch: &mut MlpScratch,
        y: &mut [f32],
    ) -> Result<MlpCounts, ShapeError> {
        check_mlp(w, rows, x, scratch, y)?;
        let scratch = &mut scratch.decode;
        let (counts, _) = decode::mlp(self.isa, &self.pool, w, rows, activation, x, None, scratch, y);
        Ok(counts)
    }

    /// As [`Cpu::mlp`], with the same `y`, and what it misses among the rows of `sample`: ascending, none twice.
    #[expect(clippy::too_many_arguments, reason = "a call of the equation, each argument one of its terms")]
    pub fn mlp_audited(
        &self,
        w: &MlpWeights<'_>,
        rows: &Rows<'_>,
        activation: Activation,
        x: &[f32],
        sample: &[u32],
        scratch: &mut MlpScratch,
        y: &mut [f32],
    ) -> Result<(MlpCounts, MlpAudit), ShapeError> {
        check_mlp(w, rows, x, scratch, y)?;
        let n_ascending = sample.windows(2).filter(|pair| pair[0] < pair[1]).count();
        check("ascending rows of a sample", sample.len().saturating_sub(1), n_ascending)?;
        let n_rows = w.gate.n_rows;
        let last = sample.last().map_or(0, |&row| row as usize);
        check("rows of a sample", last.min(n_rows.saturating_sub(1)), last)?;
        let scratch = &mut scratch.decode;
        Ok(decode::mlp(self.isa, &self.pool, w, rows, activation, x, Some(sample), scratch, y))
    }

    /// `n_neg[token, row]` for a batch, for calibration and tests. Shapes: `x (n_tokens, n_cols)`,
    /// `n_neg (n_tokens, n_rows)`.
    pub fn n_neg(
        &self,
        signs: &SignMatrix<'_>,
        n_tokens: usize,
        x: &[f32],
        n_neg: &mut [u32],
    ) -> Result<(), ShapeError> {
        check("n_neg output", n_tokens * signs.n_rows, n_neg.len())?;
        if n_tokens == 0 || signs.n_rows == 0 {
            return Ok(());
        }
        let n_cols = x.len() / n_tokens;
        check("n_neg input", n_tokens * n_cols, x.len())?;
        check_signs(signs, n_cols)?;
        let mut words = vec![0; n_tokens * signs.n_words];
        if n_cols > 0 {
            for (x, words) in x.chunks_exact(n_cols).zip(words.chunks_exact_mut(signs.n_words)) {
                decode::sign_pack(self.isa, x, words);
            }
        }
        let n_neg = pool::Shared::new(n_neg);
        let n_row_chunks = signs.n_rows.div_ceil(N_NEG_ROWS);
        self.pool.run(n_tokens * n_row_chunks, &|chunk| {
            // Tokens are inside, so that a chunk's sign words stay in cache.
            let (row, token) = (chunk / n_tokens * N_NEG_ROWS, chunk % n_tokens);
            let n_rows = N_NEG_ROWS.min(signs.n_rows - row);
            // SAFETY: each chunk has its own rows of its own token.
            let out = unsafe { n_neg.slice(token * signs.n_rows + row, n_rows) };
            let x_words = &words[token * signs.n_words..][..signs.n_words];
            decode::n_neg(
                self.isa,
                &signs.words[row * signs.n_words..][..n_rows * signs.n_words],
                x_words,
                out,
            );
        });
        Ok(())
    }

    /// `scores[token, row]` of a batch, in 8 bits of x, and each token's scale: a score divided by its scale is in
    /// units of x. For calibration and tests. Shapes: `x (n_tokens, n_cols)`, `scores (n_tokens, n_rows)`,
    /// `scales (n_tokens,)`.
    pub fn scores(
        &self,
        planes: &BitPlanes<'_>,
        n_tokens: usize,
        x: &[f32],
        scores: &mut [i32],
        scales: &mut [f32],
    ) -> Result<(), ShapeError> {
        let n_rows = planes.signs.n_rows;
        check("scores output", n_tokens * n_rows, scores.len())?;
        check("scales output", n_tokens, scales.len())?;
        if n_tokens == 0 || n_rows == 0 {
            return Ok(());
        }
        let shared = pool::Shared::new(scores);
        let found_scales = self.scored(planes, n_tokens, x, |token, row, scores, _| {
            // SAFETY: each chunk has its own rows of its own token.
            unsafe { shared.slice(token * n_rows + row, scores.len()) }.copy_from_slice(scores);
        })?;
        scales.copy_from_slice(&found_scales);
        Ok(())
    }

    /// Calls `put` with a token, the first of some rows, their scores and the token's scale, for all of `planes` in any
    /// order and on any thread. Returns the scales. Shapes: `x (n_tokens, n_cols)`, neither tokens nor rows 0.
    fn scored(
        &self,
        planes: &BitPlanes<'_>,
        n_tokens: usize,
        x: &[f32],
        put: impl Fn(usize, usize, &[i32], f32) + Sync,
    ) -> Result<Vec<f32>, ShapeError> {
        let (n_rows, n_cols) = (planes.signs.n_rows, x.len() / n_tokens);
        check("scores input", n_tokens * n_cols, x.len())?;
        check_planes(planes, n_cols)?;
        let q_len = scores::q_len(n_cols);
        let mut q = vec![0; n_tokens * q_len];
        let mut quantised = vec![None; n_tokens];
        let of_token = quantised.iter_mut().zip(q.chunks_mut(q_len.max(1)));
        let is_batch = self.isa == Isa::Avx512 && n_tokens >= SCORE_TOKENS_MIN && n_cols > 0;
        self.for_each(of_token.enumerate(), |(token, (quantised, q))| {
            let x = &x[token * n_cols..][..n_cols];
            *quantised =
                Some(if is_batch { scores::quantise(x, q) } else { decode::quantise(self.isa, x, q) });
        });
        // Without columns there are no chunks of q, and sums are empty.
        let none = scores::Quantised { q: &[], scale: 0.0, total: 0 };
        let quantised: Vec<_> = quantised.into_iter().map(|x| x.unwrap_or(none)).collect();
        #[cfg(target_arch = "x86_64")]
        if is_batch {
            let x = score_batch::Biased::new(quantised.iter().map(|x| x.q), q_len);
            self.pool.run(n_rows.div_ceil(score_batch::ROWS), &|chunk| {
                let row = chunk * score_batch::ROWS;
                let n_rows = score_batch::ROWS.min(n_rows - row);
                let put = |token: usize, scores: &[i32]| put(token, row, scores, quantised[token].scale);
                // SAFETY: `Cpu` has an instruction set only if the processor has it.
                unsafe { score_batch::scores(planes, row, n_rows, &x, put) };
            });
            return Ok(quantised.iter().map(|x| x.scale).collect());
        }
        let n_row_chunks = n_rows.div_ceil(SCORE_ROWS);
        self.pool.run(n_tokens * n_row_chunks, &|chunk| {
            // Tokens are inside, so that a chunk's planes stay in cache.
            let (row, token) = (chunk / n_tokens * SCORE_ROWS, chunk % n_tokens);
            let mut scores = [0; SCORE_ROWS];
            let scores = &mut scores[..SCORE_ROWS.min(n_rows - row)];
            if n_cols > 0 {
                decode::scores(self.isa, planes, row, &quantised[token], scores);
            }
            put(token, row, scores, quantised[token].scale);
        });
        Ok(quantised.iter().map(|x| x.scale).collect())
    }

    /// Scores of low rank of a batch. For calibration and tests. Shapes: `x (n_tokens, n_cols)`,
    /// `scores (n_tokens, n_rows)`.
    pub fn low_rank_scores(
        &self,
        factors: &LowRank<'_>,
        n_tokens: usize,
        x: &[f32],
        scores: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_low_rank(factors, factors.fc2.n_rows, factors.fc1.n_cols)?;
        check("scores output", n_tokens * factors.fc2.n_rows, scores.len())?;
        check("scores input", n_tokens * factors.fc1.n_cols, x.len())?;
        let mut inner = vec![0.0; n_tokens * factors.fc1.n_rows];
        low_rank::product(self.isa, &self.pool, &factors.fc1, n_tokens, x, &mut inner, factors.relu);
        low_rank::product(self.isa, &self.pool, &factors.fc2, n_tokens, &inner, scores, false);
        if let Some(Residual { signs, scales }) = factors.residual {
            let (mut sums, mut x_scales) = (vec![0; scores.len()], vec![0.0; n_tokens]);
            self.scores(&BitPlanes { signs, low: &[] }, n_tokens, x, &mut sums, &mut x_scales)?;
            for (idx, (score, sum)) in scores.iter_mut().zip(sums).enumerate() {
                let unit = low_rank::unit(x_scales[idx / scales.len()]);
                *score += low_rank::residual_part(sum, unit, scales[idx % scales.len()]);
            }
        }
        Ok(())
    }

    /// `skip[token, row]` of what `rows` predicts, for a batch. Without a prediction nothing is skipped.
    /// Shapes: `x (n_tokens, n_cols)`, `skip (n_tokens, n_rows)`.
    pub fn predict(
        &self,
        rows: &Rows<'_>,
        n_tokens: usize,
        x: &[f32],
        skip: &mut [bool],
    ) -> Result<(), ShapeError> {
        match rows {
            Rows::All | Rows::Active => skip.fill(false),
            Rows::Predicted { signs, limits } => {
                check_limits(limits, signs.n_rows)?;
                let mut n_neg = vec![0; skip.len()];
                self.n_neg(signs, n_tokens, x, &mut n_neg)?;
                for (idx, (skip, n_neg)) in skip.iter_mut().zip(n_neg).enumerate() {
                    *skip = n_neg > limits.of(idx % signs.n_rows);
                }
            }
            Rows::Scored { planes, thresholds } => {
                let n_rows = planes.signs.n_rows;
                check_thresholds(thresholds, n_rows)?;
                check("skipped rows", n_tokens * n_rows, skip.len())?;
                if skip.is_empty() {
                    return Ok(());
                }
                let skip = pool::Shared::new(skip);
                self.scored(planes, n_tokens, x, |token, row, scores, scale| {
                    // SAFETY: each chunk has its own rows of its own token.
                    let skip = unsafe { skip.slice(token * n_rows + row, scores.len()) };
                    for (idx, (skip, &score)) in skip.iter_mut().zip(scores).enumerate() {
                        *skip = !scores::is_kept(score, thresholds.of(row + idx), scale);
                    }
                })?;
            }
            Rows::LowRank { factors, thresholds } => {
                check_thresholds(thresholds, factors.fc2.n_rows)?;
                let mut scores = vec![0.0; skip.len()];
                self.low_rank_scores(factors, n_tokens, x, &mut scores)?;
                for (idx, (skip, score)) in skip.iter_mut().zip(scores).enumerate() {
                    *skip = !low_rank::is_kept(score, thresholds.of(idx % factors.fc2.n_rows));
                }
            }
        }
        Ok(())
    }

    /// Plain read bandwidth of all threads over `bytes`, best of `n_passes`, in GB/s (10^9).
    pub fn measure_read_gb_per_s(&self, bytes: &[u8], n_passes: usize) -> f64 {
        let mut best = f64::INFINITY;
        for _ in 0..n_passes {
            let start = std::time::Instant::now();
            decode::read_all(self.isa, &self.pool, bytes);
            best = best.min(start.elapsed().as_secs_f64());
        }
        bytes.len() as f64 / best / 1e9
    }
}

/// Tokens in a chunk of the operations on single vectors.
const TOKENS: usize = 8;
/// Rows in a chunk of [`Cpu::n_neg`].
const N_NEG_ROWS: usize = 512;
/// Inputs from which on rows are worth making into numbers for [`Cpu::scores`], on AVX-512.
const SCORE_TOKENS_MIN: usize = 8;
/// Rows in a chunk of [`Cpu::scores`].
const SCORE_ROWS: usize = 256;

/// That an MLP call's shapes fit each other.
fn check_mlp(
    w: &MlpWeights<'_>,
    rows: &Rows<'_>,
    x: &[f32],
    scratch: &MlpScratch,
    y: &[f32],
) -> Result<(), ShapeError> {
    let (n_rows, n_cols) = (w.gate.n_rows, w.gate.n_cols);
    for (w, what) in [(&w.gate, "mlp gate"), (&w.up, "mlp up"), (&w.down_t, "mlp down")] {
        check_matrix(w)?;
        check(what, n_rows, w.n_rows)?;
        check(what, n_cols, w.n_cols)?;
    }
    check("mlp input", n_cols, x.len())?;
    check("mlp output", n_cols, y.len())?;
    let (scratch_rows, scratch_words) = scratch.decode.sizes();
    check("mlp scratch rows", n_rows, scratch_rows)?;
    check("mlp scratch words", n_cols.div_ceil(32), scratch_words)?;
    match rows {
        Rows::All | Rows::Active => Ok(()),
        Rows::Predicted { signs, limits } => {
            check("sign rows", n_rows, signs.n_rows)?;
            check_signs(signs, n_cols)?;
            check_limits(limits, n_rows)
        }
        Rows::Scored { planes, thresholds } => {
            check("sign rows", n_rows, planes.signs.n_rows)?;
            check_planes(planes, n_cols)?;
            check_thresholds(thresholds, n_rows)
        }
        Rows::LowRank { factors, thresholds } => {
            check_low_rank(factors, n_rows, n_cols)?;
            check_thresholds(thresholds, n_rows)
        }
    }
}

fn check_low_rank(factors: &LowRank<'_>, n_rows: usize, n_cols: usize) -> Result<(), ShapeError> {
    let LowRank { fc1, fc2, residual, .. } = factors;
    if let Some(Residual { signs, scales }) = residual {
        check("rows of residual signs", n_rows, signs.n_rows)?;
        check_signs(signs, n_cols)?;
        check("scales of a residual", n_rows, scales.len())?;
    }
    check_matrix(fc1)?;
    check_matrix(fc2)?;
    check("columns of the first factor", n_cols, fc1.n_cols)?;
    check("rows of the second factor", n_rows, fc2.n_rows)?;
    check("columns of the second factor", fc1.n_rows, fc2.n_cols)?;
    check("rank", fc1.n_rows.min(n_cols), fc1.n_rows)
}

fn check_matrix(w: &Matrix<'_>) -> Result<(), ShapeError> {
    check("matrix elements", w.n_rows * w.n_cols, w.data.len())
}

fn check_signs(signs: &SignMatrix<'_>, n_cols: usize) -> Result<(), ShapeError> {
    check("sign words in a row", n_cols.div_ceil(32), signs.n_words)?;
    check("sign words", signs.n_rows * signs.n_words, signs.words.len())
}

fn check_planes(planes: &BitPlanes<'_>, n_cols: usize) -> Result<(), ShapeError> {
    check_signs(&planes.signs, n_cols)?;
    let n_planes = planes.n_planes();
    check("bit planes", n_planes.min(PLANES_MAX), n_planes)?;
    check("words of lower planes", (n_planes - 1) * planes.signs.words.len(), planes.low.len())
}

fn check_thresholds(thresholds: &Thresholds<'_>, n_rows: usize) -> Result<(), ShapeError> {
    match thresholds {
        Thresholds::Layer(_) => Ok(()),
        Thresholds::PerRow(thresholds) => check("thresholds", n_rows, thresholds.len()),
    }
}

fn check_limits(limits: &Limits<'_>, n_rows: usize) -> Result<(), ShapeError> {
    match limits {
        Limits::Layer(_) => Ok(()),
        Limits::PerRow(limits) => check("limits", n_rows, limits.len()),
    }
}
