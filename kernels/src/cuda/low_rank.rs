//! Rows that a predictor of low rank leaves out: of a batch by two kernels (prefill_low_rank.cu), of one token by one
//! (predict_low_rank.cu).

use super::gemm::check_grid;
use super::launch::{LowRankArgs, RowsArgs, SCORE_ROWS, check_aligned, check_floats};
use super::{Buffer, CudaError, Device, DeviceLowRank, DeviceRows, DeviceThresholds, Dtype, Quantised, View};
use crate::shape::{DOT_CHAINS, DOT_SEGMENT, check};

const WARP: usize = 32;
/// Threads of a block over a batch, and its rows of the second factor.
const BATCH_THREADS: usize = 128;
const BATCH_ROWS: usize = 32;
/// Threads of a block of the kernel for one token.
const TOKEN_THREADS: usize = 512;
/// Columns that it takes whole multiples of: segments of a dot product, and steps of the words of signs.
const TOKEN_COLS: usize = 512;

/// The predictor of low rank over a batch.
#[derive(Clone, Copy, Debug)]
pub struct LowRankCall<'a> {
    /// Tokens.
    pub n_tokens: usize,
    /// The batch after its norm, `(n_tokens, n_cols)` f32.
    pub x: View<'a>,
    /// The same in 8 bits, where there is a residual.
    pub quantised: Option<Quantised<'a>>,
    /// The factors.
    pub factors: DeviceLowRank<'a>,
    /// Thresholds on the score.
    pub thresholds: DeviceThresholds<'a>,
    /// `(n_tokens, n_rows)` u8, 1 where a row is left out; written.
    pub skip: View<'a>,
}

/// Buffers of [`Device::predict_low_rank`], made once per session.
#[derive(Debug)]
pub struct LowRankScratch {
    rank_max: usize,
    /// Of the kernels over a batch.
    products: Buffer,
    inner: Buffer,
    turns: Buffer,
}

#[repr(C)]
struct PrefillInnerArgs {
    x: u64,
    fc1: u64,
    inner: u64,
    rank: i32,
    n_cols: i32,
    relu: u32,
}

#[repr(C)]
struct PrefillSkipLowRankArgs {
    factors: LowRankArgs,
    inner: u64,
    planes: u64,
    x_scales: u64,
    signs: u64,
    limits: u64,
    skip: u64,
    n_rows: i32,
    n_words: i32,
    limit: u32,
}

#[repr(C)]
struct PredictLowRankArgs {
    factors: LowRankArgs,
    x: u64,
    planes: u64,
    x_scale: u64,
    signs: u64,
    limits: u64,
    inner: u64,
    turns: u64,
    skip: u64,
    n_rows: i32,
    n_cols: i32,
    limit: u32,
    block_rows: i32,
    block_inner: i32,
    inner_floats: i32,
}

impl LowRankCall<'_> {
    fn rank(&self) -> usize {
        self.factors.fc1.n_rows()
    }

    fn n_cols(&self) -> usize {
        self.factors.fc1.n_cols()
    }

    fn n_rows(&self) -> usize {
        self.factors.fc2.n_rows()
    }

    /// The rows, everything checked.
    fn rows(&self) -> Result<RowsArgs, CudaError> {
        let Self { n_tokens, factors, thresholds, .. } = *self;
        check_floats("predictor input", n_tokens * self.n_cols(), self.x)?;
        check("bytes of rows left out", n_tokens * self.n_rows(), self.skip.len_bytes())?;
        let needs_quantised = usize::from(factors.residual.is_some());
        check("inputs in 8 bits for a residual", needs_quantised, self.quantised.iter().len())?;
        if let Some(quantised) = self.quantised {
            quantised.check(n_tokens, self.n_cols())?;
            check_aligned(quantised.planes.address())?;
        }
        check_aligned(self.x.address())?;
        check_grid("tokens of a batch", n_tokens, 1)?;
        RowsArgs::new(&DeviceRows::LowRank { factors, thresholds }, self.n_rows(), self.n_cols())
    }

    /// Addresses of the input in 8 bits and of its scales, 0 without.
    fn quantised_addresses(&self) -> [u64; 2] {
        self.quantised.map_or([0; 2], |quantised| [quantised.planes.address(), quantised.scales.address()])
    }
}

impl Device {
    /// `skip[t, row] = score(t, row) < threshold(row)`. `inner`, `(n_tokens, rank)` f32, is written: products with the
    /// first factor.
    ///
    /// # Errors
    /// [`CudaError::Shape`], also for a residual without inputs in 8 bits; [`CudaError::MixedTypes`];
    /// [`CudaError::Unsupported`].
    pub fn prefill_skip_low_rank(&self, call: &LowRankCall<'_>, inner: View<'_>) -> Result<(), CudaError> {
        let (n_tokens, rank, n_cols, n_rows) = (call.n_tokens, call.rank(), call.n_cols(), call.n_rows());
        let rows = call.rows()?;
        check_floats("inner products", n_tokens * rank, inner)?;
        check_aligned(inner.address())?;
        if n_tokens == 0 || n_rows == 0 {
            return Ok(());
        }
        let args = PrefillInnerArgs {
            x: call.x.address(),
            fc1: rows.factors.fc1,
            inner: inner.address(),
            rank: rank as i32,
            n_cols: n_cols as i32,
            relu: rows.factors.relu,
        };
        let shared_bytes = self.check_shared(n_cols.div_ceil(DOT_SEGMENT) * DOT_CHAINS * size_of::<f32>())?;
        // SAFETY: every length was checked above.
        unsafe { self.launch("prefill_inner", [rank, n_tokens, 1], BATCH_THREADS, shared_bytes, &args)? };
        let [planes, x_scales] = call.quantised_addresses();
        let args = PrefillSkipLowRankArgs {
            factors: rows.factors,
            inner: inner.address(),
            planes,
            x_scales,
            signs: rows.signs,
            limits: rows.limits,
            skip: call.skip.address(),
            n_rows: n_rows as i32,
            n_words: n_cols.div_ceil(WARP) as i32,
            limit: rows.limit,
        };
        let grid = [n_rows.div_ceil(BATCH_ROWS), n_tokens, 1];
        // SAFETY: as above; the kernel keeps to the rows of the factors.
        unsafe { self.launch("prefill_skip_low_rank", grid, BATCH_THREADS, 0, &args) }
    }

    /// Scratch for factors of at most `rank_max`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn low_rank_scratch(&self, rank_max: usize) -> Result<LowRankScratch, CudaError> {
        Ok(LowRankScratch {
            rank_max,
            products: self.alloc(rank_max * size_of::<f32>())?,
            inner: self.alloc(rank_max * size_of::<u64>())?,
            turns: self.alloc(self.n_multiprocessors() * size_of::<u32>())?,
        })
    }

    /// What [`Device::prefill_skip_low_rank`] gives for one token, in one kernel where the rank is a multiple of 8 and
    /// columns of 512, and what a block holds of them fits shared memory.
    ///
    /// # Errors
    /// As there; [`CudaError::Shape`] for more tokens or a rank above that of `scratch`.
    pub fn predict_low_rank(
        &self,
        call: &LowRankCall<'_>,
        scratch: &LowRankScratch,
    ) -> Result<(), CudaError> {
        let (rank, n_cols, n_rows) = (call.rank(), call.n_cols(), call.n_rows());
        let rows = call.rows()?;
        check("tokens", 1, call.n_tokens)?;
        check("rank that the scratch has room for", scratch.rank_max.max(rank), scratch.rank_max)?;
        if n_rows == 0 {
            return Ok(());
        }
        let n_blocks = self.n_multiprocessors();
        // The kernel multiplies two rows of the first factor at a time.
        let (block_rows, block_inner) =
            (n_rows.div_ceil(n_blocks), rank.div_ceil(n_blocks).next_multiple_of(2));
        let inner_floats = rank.next_multiple_of(DOT_CHAINS);
        let n_sums = block_inner * (n_cols / DOT_SEGMENT) * DOT_CHAINS;
        let fc1_bytes = block_inner * n_cols * Dtype::F16.n_bytes();
        let sign_bytes = match call.factors.residual {
            None => 0,
            Some(_) => {
                block_rows.next_multiple_of(SCORE_ROWS).min(TOKEN_THREADS / WARP * SCORE_ROWS) * n_cols / 8
            }
        };
        let takes = rank.is_multiple_of(8) && n_cols.is_multiple_of(TOKEN_COLS);
        let bytes = (inner_floats + n_sums) * size_of::<f32>() + fc1_bytes + sign_bytes;
        let (true, Ok(shared_bytes)) = (takes, self.check_shared(bytes)) else {
            return self
                .prefill_skip_low_rank(call, scratch.products.view().slice(0, rank * size_of::<f32>()));
        };
        let kernel = match call.factors.residual {
            None => "predict_low_rank",
            Some(_) => "predict_low_rank_sign",
        };
        let [planes, x_scale] = call.quantised_addresses();
        let args = PredictLowRankArgs {
            factors: rows.factors,
            x: call.x.address(),
            planes,
            x_scale,
            signs: rows.signs,
            limits: rows.limits,
            inner: scratch.inner.view().address(),
            turns: scratch.turns.view().address(),
            skip: call.skip.address(),
            n_rows: n_rows as i32,
            n_cols: n_cols as i32,
            limit: rows.limit,
            block_rows: block_rows as i32,
            block_inner: block_inner as i32,
            inner_floats: inner_floats as i32,
        };
        // SAFETY: every length was checked above; the grid is the same for every launch with this scratch, and the kernel
        // waits for the one before.
        unsafe {
            let overlaps = self.overlaps();
            self.launch_together(kernel, n_blocks, TOKEN_THREADS, shared_bytes, overlaps, &args)
        }
    }
}
