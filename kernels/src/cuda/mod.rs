//! The CUDA backend: kernels compiled ahead by nvcc into one fat binary inside this library, started through the
//! driver alone, which is opened at run time. The same program starts on a machine without one.
//!
//! [`Device`] holds a context, the loaded kernels and one stream; `launch` has one checked function for each kernel;
//! a [`Graph`] is a recorded run of them. Deliberately absent: any knowledge of a model, any choice of what runs on
//! which device, and the CUDA toolkit.

mod audit;
mod cublas;
mod decode;
mod device;
mod error;
mod gemm;
mod launch;
mod low_rank;
mod memory;
mod prefill;
mod sample;
mod upload;

pub use audit::{AuditCall, AuditLayer, AuditRecord, AuditScratch, MlpTrace, audit_of};
pub use decode::{DECODE_STEPS, DecodeCall, DecodeLayer, DecodeScratch, ReadingStep, StepTime, step_times};
pub use device::{Device, DeviceInfo, Event, Graph, list_devices};
pub use error::CudaError;
pub use gemm::{Gemm, GemmCall};
pub use launch::{
    AttentionCall, AttentionScratch, DeviceLimits, DeviceLowRank, DeviceMatrix, DevicePlanes, DeviceResidual,
    DeviceRows, DeviceThresholds, DownCall, DownScratch, Dtype, GateUpCall, MatvecCall, PredictScoresCall,
    QkvCall,
};
pub use low_rank::{LowRankCall, LowRankScratch};
pub use memory::{Buffer, HostBuffer, Mapped, View};
pub use prefill::{
    FloatRows, PrefillAttentionCall, PrefillGatedCall, PrefillNormCall, PrefillQuantiseCall, PrefillRopeCall,
    PrefillSkipCall, PrefillSkipScoresCall, Quantised, quantised_bytes, rounded_bytes,
};
pub use sample::{Chosen, SampleCall};
pub use upload::{Mirror, Placement, ReadAt, UploadError, UploadPlan, upload};

/// The fat binary, if this library was built with nvcc.
mod image {
    include!(concat!(env!("OUT_DIR"), "/cuda_image.rs"));
}

/// True if the kernels are part of this program.
pub fn is_built_in() -> bool {
    image::IMAGE.is_some()
}
