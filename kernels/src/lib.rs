//! Maths of a Llama layer with a row-sparse MLP, on slices and shapes.
//!
//! [`mod@reference`] is the scalar truth; [`cpu`] and [`cuda`] are the backends that run. Nothing here knows a file, a flag or a model.
//! Deliberately absent: I/O, allocation inside a decode step, and any choice of model.

pub mod bytes;
pub mod cpu;
pub mod cuda;
pub mod reference;
pub mod sample;
pub mod shape;

pub use cpu::{AttentionScratch, Cpu, Isa, MlpScratch, Moments, Sweeps};
pub use shape::{
    Activation, AttentionShape, BitPlanes, Elements, Limits, LowRank, Matrix, Matvec, MlpAudit, MlpCounts,
    MlpWeights, PLANES_MAX, Residual, Rows, ShapeError, SignMatrix, Thresholds,
};
