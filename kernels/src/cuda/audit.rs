//! What the MLPs of a token missed among drawn rows (audit.cu): the buffers that the token and the audit share, and the
//! launch.

use super::launch::{RowCut, activation_args, check_aligned, check_floats, same_type};
use super::{Buffer, CudaError, Device, DeviceMatrix, Dtype, View};
use crate::shape::check;
use crate::{Activation, MlpAudit};

/// `AUDIT_LAYERS` of audit.cu.
const LAYERS: usize = 128;
const THREADS: usize = 512;
const WARP: usize = 32;
/// Blocks that fit an SM at once.
const BLOCKS_PER_SM: usize = 2;
/// Most drawn rows of a block, one for each thread.
const PART_ROWS: usize = THREADS;
/// `AuditRecord` of audit.cu, in u64.
const RECORD_WORDS: usize = 3;

/// What [`AuditScratch::records`] holds of each block: two energies as bits of f64, then rows left out and those of them
/// that are active, two u32.
pub type AuditRecord = [u64; RECORD_WORDS];

/// Where a token leaves what an audit of its MLPs looks at.
#[derive(Clone, Copy, Debug)]
pub struct MlpTrace<'a> {
    /// Inputs after their norm, `(n_layers, d)` f32; written.
    pub x: View<'a>,
    /// `(n_layers, f)` f32, 0 where a row is left out; written.
    pub h: View<'a>,
    /// `(n_layers, f)` u8, 1 where the predictor left a row out; written.
    pub skip: View<'a>,
}

/// The weights of a layer that an audit reads.
#[derive(Clone, Copy, Debug)]
pub struct AuditLayer<'a> {
    /// `(f, d)`.
    pub w_gate: DeviceMatrix<'a>,
    /// `(f, d)`.
    pub w_up: DeviceMatrix<'a>,
}

/// An audit of the token that [`AuditScratch::trace`] is of. Shapes as in audit.cu.
#[derive(Clone, Copy, Debug)]
pub struct AuditCall<'a> {
    /// In order; none for one that predicts nothing.
    pub layers: &'a [Option<AuditLayer<'a>>],
    /// What stands between gate and up.
    pub activation: Activation,
    /// Holds the token's trace, norms and sample; its records are written, those of layers that are none are not.
    pub scratch: &'a AuditScratch,
}

/// Buffers of [`Device::audit`], made once per session.
#[derive(Debug)]
pub struct AuditScratch {
    n_layers: usize,
    d: usize,
    f: usize,
    n_drawn: usize,
    /// Of each layer.
    n_blocks: usize,
    x: Buffer,
    h: Buffer,
    skip: Buffer,
    norms: Buffer,
    sample: Buffer,
    records: Buffer,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct LayerArgs {
    w_gate: u64,
    w_up: u64,
}

#[repr(C)]
struct AuditArgs {
    cut: RowCut,
    x: u64,
    h: u64,
    skip: u64,
    norms: u64,
    sample: u64,
    records: u64,
    n_rows: i32,
    n_drawn: i32,
    n_part_max: i32,
    activation: u32,
    threshold: f32,
    layers: [LayerArgs; LAYERS],
}

#[repr(C)]
struct SquaredNormsArgs {
    w: u64,
    norms: u64,
    n_rows: i32,
    n_cols: i32,
    wide: i32,
}

impl<'a> MlpTrace<'a> {
    /// The addresses for a kernel that writes `n_layers` layers of `f` rows of `d` columns, four columns at a time.
    pub(super) fn addresses(self, n_layers: usize, d: usize, f: usize) -> Result<[u64; 3], CudaError> {
        check_floats("traced inputs", n_layers * d, self.x)?;
        check_floats("traced h", n_layers * f, self.h)?;
        check("traced rows left out", n_layers * f, self.skip.len_bytes())?;
        check_aligned(self.x.address())?;
        Ok([self.x, self.h, self.skip].map(View::address))
    }

    /// The part of one layer.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(self, layer: usize, d: usize, f: usize) -> Self {
        let floats =
            |view: View<'a>, n: usize| view.slice(layer * n * size_of::<f32>(), n * size_of::<f32>());
        Self { x: floats(self.x, d), h: floats(self.h, f), skip: self.skip.slice(layer * f, f) }
    }
}

impl AuditScratch {
    /// For the token to fill.
    pub fn trace(&self) -> MlpTrace<'_> {
        MlpTrace { x: self.x.view(), h: self.h.view(), skip: self.skip.view() }
    }

    /// Rows to look at, `(n_layers, n_drawn)` u32, none twice in a layer; what is no row stands for none.
    pub fn sample(&self) -> View<'_> {
        self.sample.view()
    }

    /// Squared norms of the rows of a layer's w_down_t, `(f,)` f32, for [`Device::squared_norms`] to fill once.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn norms(&self, layer: usize) -> View<'_> {
        let n_bytes = self.f * size_of::<f32>();
        self.norms.view().slice(layer * n_bytes, n_bytes)
    }

    /// What [`Device::audit`] found, `(n_layers, n_blocks)` of [`AuditRecord`].
    pub fn records(&self) -> View<'_> {
        self.records.view()
    }

    /// Records of each layer.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }
}

/// What the blocks of a layer found together.
pub fn audit_of(records: &[AuditRecord]) -> MlpAudit {
    records.iter().fold(MlpAudit::default(), |sum, &[missed, kept, counts]| MlpAudit {
        n_skipped: sum.n_skipped + counts as u32 as usize,
        n_missed: sum.n_missed + (counts >> 32) as usize,
        missed_energy: sum.missed_energy + f64::from_bits(missed),
        kept_energy: sum.kept_energy + f64::from_bits(kept),
    })
}

impl Device {
    /// Room for audits of `n_layers` MLPs of `f` neurons over `d` inputs, `n_drawn` of them drawn.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn audit_scratch(
        &self,
        n_layers: usize,
        d: usize,
        f: usize,
        n_drawn: usize,
    ) -> Result<AuditScratch, CudaError> {
        let at_once = BLOCKS_PER_SM * self.n_multiprocessors() / n_layers.max(1);
        let n_blocks = at_once.max(n_drawn.div_ceil(PART_ROWS)).max(1);
        let floats = |n: usize| self.alloc(n * size_of::<f32>());
        Ok(AuditScratch {
            n_layers,
            d,
            f,
            n_drawn,
            n_blocks,
            x: floats(n_layers * d)?,
            h: floats(n_layers * f)?,
            skip: self.alloc(n_layers * f)?,
            norms: floats(n_layers * f)?,
            sample: self.alloc(n_layers * n_drawn * size_of::<u32>())?,
            records: self.alloc(n_layers * n_blocks * size_of::<AuditRecord>())?,
        })
    }

    /// What the token missed among the rows of the sample, in each layer.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::MixedTypes`], [`CudaError::Unsupported`].
    pub fn audit(&self, call: &AuditCall<'_>) -> Result<(), CudaError> {
        let AuditScratch { n_layers, d, f, .. } = *call.scratch;
        check("layers of an audit", n_layers, call.layers.len())?;
        for AuditLayer { w_gate, w_up } in call.layers.iter().flatten() {
            same_type("gate and up weights", &[w_gate, w_up])?;
            for w in [w_gate, w_up] {
                check("rows of an audited matrix", f, w.n_rows())?;
                check("columns of an audited matrix", d, w.n_cols())?;
            }
        }
        for first in (0..n_layers).step_by(LAYERS) {
            let layers = first..n_layers.min(first + LAYERS);
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                self.audit_layers(call, first, &call.layers[layers.clone()], dtype)?;
            }
        }
        Ok(())
    }

    /// Those of `layers`, which begin at layer `first`, whose weights are of one type; their shapes fit.
    fn audit_layers(
        &self,
        call: &AuditCall<'_>,
        first: usize,
        layers: &[Option<AuditLayer<'_>>],
        dtype: Dtype,
    ) -> Result<(), CudaError> {
        let of_type: Vec<(usize, AuditLayer<'_>)> = layers
            .iter()
            .enumerate()
            .filter_map(|(idx, layer)| layer.map(|layer| (idx, layer)))
            .filter(|(_, layer)| layer.w_gate.dtype() == dtype)
            .collect();
        if of_type.is_empty() {
            return Ok(());
        }
        let matrices: Vec<DeviceMatrix<'_>> =
            of_type.iter().flat_map(|(_, layer)| [layer.w_gate, layer.w_up]).collect();
        let scratch = call.scratch;
        let cut = RowCut::new(self, &matrices);
        let n_part_max = scratch.n_drawn.div_ceil(scratch.n_blocks);
        // h, rows, two queues, and a row of partial sums.
        let row_bytes = 4 * 4 + cut.n_segs() * 4;
        let shared_bytes = self.check_shared(cut.slot_bytes(dtype) + n_part_max * row_bytes)?;
        let (activation, threshold) = activation_args(call.activation);
        let mut table = [LayerArgs { w_gate: 0, w_up: 0 }; LAYERS];
        for (idx, AuditLayer { w_gate, w_up }) in of_type {
            table[idx] = LayerArgs { w_gate: w_gate.data().address(), w_up: w_up.data().address() };
        }
        let from_first = |buffer: &Buffer| {
            let layer_bytes = buffer.view().len_bytes() / scratch.n_layers;
            buffer.view().slice(first * layer_bytes, layers.len() * layer_bytes).address()
        };
        let args = AuditArgs {
            cut,
            x: from_first(&scratch.x),
            h: from_first(&scratch.h),
            skip: from_first(&scratch.skip),
            norms: from_first(&scratch.norms),
            sample: from_first(&scratch.sample),
            records: from_first(&scratch.records),
            n_rows: scratch.f as i32,
            n_drawn: scratch.n_drawn as i32,
            n_part_max: n_part_max as i32,
            activation,
            threshold,
            layers: table,
        };
        let kernel = format!("audit_{}", dtype.suffix());
        let grid = [scratch.n_blocks, layers.len(), 1];
        // SAFETY: the matrices were checked; the scratch was made for these layers.
        unsafe { self.launch(&kernel, grid, THREADS, shared_bytes, &args) }
    }

    /// `norms[row] = |w[row]|^2`, `(n_rows,)` f32.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn squared_norms(&self, w: &DeviceMatrix<'_>, norms: View<'_>) -> Result<(), CudaError> {
        check_floats("squared norms", w.n_rows(), norms)?;
        let args = SquaredNormsArgs {
            w: w.data().address(),
            norms: norms.address(),
            n_rows: w.n_rows() as i32,
            n_cols: w.n_cols() as i32,
            wide: w.is_wide().into(),
        };
        let n_blocks = w.n_rows().div_ceil(THREADS / WARP).clamp(1, BLOCKS_PER_SM * self.n_multiprocessors());
        let kernel = format!("squared_norms_{}", w.dtype().suffix());
        // SAFETY: the length was checked above.
        unsafe { self.launch(&kernel, [n_blocks, 1, 1], THREADS, 0, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_blocks_add_up() {
        let record = |missed: f64, kept: f64, n_skipped: u64, n_missed: u64| {
            [missed.to_bits(), kept.to_bits(), n_missed << 32 | n_skipped]
        };
        let found = audit_of(&[record(0.5, 2.0, 7, 3), record(0.25, 0.0, 0xffff_ffff, 0)]);
        let n_skipped = 7 + 0xffff_ffff;
        assert_eq!(found, MlpAudit { n_skipped, n_missed: 3, missed_energy: 0.75, kept_energy: 2.0 });
        assert_eq!(audit_of(&[]), MlpAudit::default());
    }
}
