//! Products of a batch with a matrix: cuBLASLt where the machine has it, else the kernels of `prefill_gemm.cu` and, on
//! Hopper, of `prefill_gemm_hopper.cu`.

use cudarc::driver::sys;

use super::cublas::{self, Cublas};
use super::error::Context as _;
use super::prefill::rounded_bytes;
use super::{CudaError, Device, DeviceMatrix, Dtype, View};
use crate::shape::check;

/// Columns of x that a tile of `prefill_gemm.cu` holds.
const DEPTH: usize = 32;
/// Elements between the rows of a tile beyond their width.
const PADDING: usize = 8;
/// Side of a tile of the kernel for f32.
const PLAIN_TILE: usize = 64;

/// Makes products; one for each device and session.
#[derive(Debug)]
pub struct Gemm {
    cublas: Option<Cublas>,
}

/// One product. Shapes as in prefill_gemm.cu.
#[derive(Clone, Copy, Debug)]
pub struct GemmCall<'a> {
    /// `(n_out, n_in)`, or `(n_in, n_out)` if `transposed`.
    pub w: DeviceMatrix<'a>,
    /// The rows of `w` are inputs, as those of W_down transposed.
    pub transposed: bool,
    /// Rows of `x` and `y`.
    pub n_tokens: usize,
    /// `(n_tokens, n_in)`, rounded: [`rounded_bytes`].
    pub x: View<'a>,
    /// `(n_tokens, n_out)` f32; written.
    pub y: View<'a>,
    /// Adds to `y` instead of replacing it.
    pub accumulate: bool,
}

impl GemmCall<'_> {
    pub(super) fn n_in(&self) -> usize {
        if self.transposed { self.w.n_rows() } else { self.w.n_cols() }
    }

    pub(super) fn n_out(&self) -> usize {
        if self.transposed { self.w.n_cols() } else { self.w.n_rows() }
    }
}

#[repr(C)]
struct PrefillGemmArgs {
    x: u64,
    w: u64,
    y: u64,
    n_tokens: i32,
    n_in: i32,
    n_out: i32,
    accumulate: i32,
}

impl Gemm {
    /// Device memory that [`Gemm::new`] takes at most.
    pub const WORKSPACE_BYTES: usize = cublas::WORKSPACE_BYTES;

    /// With cuBLASLt if it can be opened.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] for the workspace.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self { cublas: Cublas::open(device)? })
    }

    /// Opens cuBLASLt, so that [`Gemm::new`] is quick; for a thread of its own, while weights are on their way. Says
    /// whether it is there.
    pub fn preload() -> bool {
        cublas::is_there()
    }

    /// With this library's kernels alone.
    pub fn without_cublas() -> Self {
        Self { cublas: None }
    }

    /// True if cuBLASLt was opened.
    pub fn uses_cublas(&self) -> bool {
        self.cublas.is_some()
    }

    /// `y (+)= x Wᵀ`, or `y (+)= x W` with `transposed`.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`], [`CudaError::Cublas`].
    pub fn multiply(&mut self, device: &Device, call: &GemmCall<'_>) -> Result<(), CudaError> {
        let (n_tokens, n_in, n_out) = (call.n_tokens, call.n_in(), call.n_out());
        check("inputs of a product, at least one", n_in.max(1), n_in)?;
        check("product input bytes", rounded_bytes(call.w.dtype(), n_tokens, n_in), call.x.len_bytes())?;
        check("product output bytes", n_tokens * n_out * size_of::<f32>(), call.y.len_bytes())?;
        if n_tokens == 0 || n_out == 0 {
            return Ok(());
        }
        if let Some(cublas) = &mut self.cublas
            && cublas.multiply(device, call)?
        {
            return Ok(());
        }
        multiply(device, call)
    }
}

/// A tile of `prefill_gemm.cu`, by the names given there.
struct Tile {
    name: &'static str,
    n_tokens: usize,
    n_outs: usize,
    n_threads: usize,
    n_stages: usize,
}

const LARGE: Tile = Tile { name: "large", n_tokens: 128, n_outs: 128, n_threads: 256, n_stages: 4 };
const MEDIUM: Tile = Tile { name: "medium", n_tokens: 64, n_outs: 64, n_threads: 128, n_stages: 5 };
const SMALL: Tile = Tile { name: "small", n_tokens: 32, n_outs: 32, n_threads: 128, n_stages: 8 };
/// Rows that are not multiples of 16 bytes.
const ANY: Tile = Tile { name: "any", n_tokens: 64, n_outs: 64, n_threads: 128, n_stages: 2 };

/// True if the rows of x and w start at multiples of 16 bytes.
fn is_aligned(call: &GemmCall<'_>) -> bool {
    let row_bytes = [call.n_in(), call.w.n_cols()].map(|n| (n * call.w.dtype().n_bytes()) as u64);
    let addresses = [call.x.address(), call.w.data().address()];
    row_bytes.into_iter().chain(addresses).all(|n| n.is_multiple_of(16))
}

impl Tile {
    fn of(device: &Device, call: &GemmCall<'_>) -> Self {
        if !is_aligned(call) {
            return ANY;
        }
        // Large tiles reuse more of what they read, where they are filled and enough for the device.
        let is_worth_it = |tile: &Self| {
            let n_tiles = call.n_tokens.div_ceil(tile.n_tokens) * call.n_out().div_ceil(tile.n_outs);
            2 * call.n_tokens > tile.n_tokens && 4 * n_tiles >= 3 * device.n_multiprocessors()
        };
        [LARGE, MEDIUM].into_iter().find(is_worth_it).unwrap_or(SMALL)
    }

    /// Dynamic shared memory, as `GemmStage` lays it out.
    fn shared_bytes(&self, transposed: bool) -> usize {
        let x = self.n_tokens * (DEPTH + PADDING);
        let w = if transposed { DEPTH * (self.n_outs + PADDING) } else { self.n_outs * (DEPTH + PADDING) };
        self.n_stages * (x + w) * size_of::<u16>()
    }
}

/// The product by this library's kernels.
fn multiply(device: &Device, call: &GemmCall<'_>) -> Result<(), CudaError> {
    if let Some(n_outs) = wide_outs(device, call) {
        return multiply_wide(device, call, n_outs);
    }
    let suffix = if call.transposed { "_t" } else { "" };
    let dtype = call.w.dtype().suffix();
    let (kernel, tile_tokens, tile_outs, n_threads, shared_bytes) = match call.w.dtype() {
        Dtype::F32 => (format!("prefill_gemm_{dtype}{suffix}"), PLAIN_TILE, PLAIN_TILE, 256, 0),
        Dtype::F16 | Dtype::Bf16 => {
            let tile = Tile::of(device, call);
            let kernel = format!("prefill_gemm_{dtype}_{}{suffix}", tile.name);
            (kernel, tile.n_tokens, tile.n_outs, tile.n_threads, tile.shared_bytes(call.transposed))
        }
    };
    let grid = [call.n_tokens.div_ceil(tile_tokens), call.n_out().div_ceil(tile_outs), 1];
    check_grid("outputs of a product", grid[1], tile_outs)?;
    let args = PrefillGemmArgs {
        x: call.x.address(),
        w: call.w.data().address(),
        y: call.y.address(),
        n_tokens: call.n_tokens as i32,
        n_in: call.n_in() as i32,
        n_out: call.n_out() as i32,
        accumulate: call.accumulate.into(),
    };
    // SAFETY: the lengths of x and y were checked by `Gemm::multiply`, that of w by its maker.
    unsafe { device.launch(&kernel, grid, n_threads, shared_bytes, &args) }
}

/// Tokens and columns of a tile of `prefill_gemm_hopper.cu`, and blocks of a cluster.
const WIDE_TOKENS: usize = 128;
const WIDE_DEPTH: usize = 64;
const WIDE_CLUSTER: usize = 2;
const WIDE_THREADS: usize = 288;
/// Outputs of a tile, narrow and wide, and the stages that fit beside each other.
const WIDE_OUTS: [(usize, usize); 2] = [(128, 6), (256, 4)];
/// Time of a wide tile in times of a narrow one: twice the arithmetic, with fewer bytes for each.
const WIDE_COST: f64 = 1.75;

/// A `CUtensorMap`.
#[repr(C, align(64))]
struct TensorMap([u64; 16]);

#[repr(C)]
struct PrefillGemmWideArgs {
    x: TensorMap,
    w: TensorMap,
    y: u64,
    n_tokens: i32,
    n_in: i32,
    n_out: i32,
    accumulate: i32,
}

fn wide_kernel(call: &GemmCall<'_>, n_outs: usize) -> String {
    let suffix = if call.transposed { "_t" } else { "" };
    format!("prefill_gemm_{}_wide{n_outs}{suffix}", call.w.dtype().suffix())
}

/// Outputs of a tile of the kernel for Hopper, if this device has it and there are tokens for more than one.
fn wide_outs(device: &Device, call: &GemmCall<'_>) -> Option<usize> {
    let [(narrow, _), (wide, _)] = WIDE_OUTS;
    if call.n_tokens <= WIDE_TOKENS || !is_aligned(call) || !device.has_kernel(&wide_kernel(call, narrow)) {
        return None;
    }
    let rounds = |n_outs: usize| {
        let [n_token_tiles, n_out_tiles, _] = wide_grid(call, n_outs);
        (n_token_tiles * n_out_tiles).div_ceil(device.n_multiprocessors()) as f64
    };
    Some(if rounds(wide) * WIDE_COST < rounds(narrow) { wide } else { narrow })
}

fn wide_grid(call: &GemmCall<'_>, n_outs: usize) -> [usize; 3] {
    let n_token_tiles = call.n_tokens.div_ceil(WIDE_TOKENS).next_multiple_of(WIDE_CLUSTER);
    [n_token_tiles, call.n_out().div_ceil(n_outs), 1]
}

/// The product by the kernel for Hopper, `n_outs` outputs in a tile.
fn multiply_wide(device: &Device, call: &GemmCall<'_>, n_outs: usize) -> Result<(), CudaError> {
    let n_rows_x = call.x.len_bytes() / (call.n_in() * call.w.dtype().n_bytes());
    let box_rows_w = if call.transposed { WIDE_DEPTH } else { n_outs / WIDE_CLUSTER };
    let (_, n_stages) = WIDE_OUTS.into_iter().find(|&(outs, _)| outs == n_outs).expect("one of the two");
    let stage_bytes = (WIDE_TOKENS + n_outs) * WIDE_DEPTH * call.w.dtype().n_bytes();
    // The barriers of the stages come after them, up to the next multiple of their alignment.
    let shared_bytes = n_stages * stage_bytes + 1024;
    let grid = wide_grid(call, n_outs);
    check_grid("outputs of a product", grid[1], n_outs)?;
    device.context.make_current()?;
    let args = PrefillGemmWideArgs {
        x: tensor_map(call.w.dtype(), call.x, n_rows_x, call.n_in(), WIDE_TOKENS)?,
        w: tensor_map(call.w.dtype(), call.w.data(), call.w.n_rows(), call.w.n_cols(), box_rows_w)?,
        y: call.y.address(),
        n_tokens: call.n_tokens as i32,
        n_in: call.n_in() as i32,
        n_out: call.n_out() as i32,
        accumulate: call.accumulate.into(),
    };
    // SAFETY: the lengths of x and y were checked by `Gemm::multiply`, that of w by its maker; the maps end where the
    // matrices do.
    unsafe { device.launch(&wide_kernel(call, n_outs), grid, WIDE_THREADS, shared_bytes, &args) }
}

/// Boxes of `box_rows` rows and [`WIDE_DEPTH`] columns of the matrix `(n_rows, n_cols)` at `data`, in swizzled rows.
fn tensor_map(
    dtype: Dtype,
    data: View<'_>,
    n_rows: usize,
    n_cols: usize,
    box_rows: usize,
) -> Result<TensorMap, CudaError> {
    let element = match dtype {
        Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: writes the map; the arrays are as long as the two dimensions ask for.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            element,
            2,
            data.address() as *mut _,
            [n_cols as u64, n_rows as u64].as_ptr(),
            [(n_cols * dtype.n_bytes()) as u64].as_ptr(),
            [WIDE_DEPTH as u32, box_rows as u32].as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .during("describe a matrix to the device")?;
    Ok(TensorMap(map.opaque))
}

/// Grids have at most 65535 blocks in their second dimension.
pub(super) fn check_grid(what: &'static str, n_blocks: usize, per_block: usize) -> Result<(), CudaError> {
    let max = usize::from(u16::MAX);
    if n_blocks > max {
        return Err(CudaError::Unsupported { what, found: n_blocks * per_block, max: max * per_block });
    }
    Ok(())
}
