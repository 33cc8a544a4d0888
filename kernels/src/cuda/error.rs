//! Why the CUDA backend cannot do what was asked: one variant per cause.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::ShapeError;

/// Why the CUDA backend cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The program was built without nvcc.
    #[error("CUDA is not built into this program")]
    NotBuiltIn,
    /// The driver's library is not on this machine.
    #[error("no NVIDIA driver: libcuda cannot be opened")]
    NoDriver,
    /// The driver does not start.
    #[error("the NVIDIA driver does not start: {0}")]
    DriverStart(String),
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver speaks CUDA {}.{}, at least {}.{} is needed", found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10)]
    DriverTooOld {
        /// As the driver says it, 1000 * major + 10 * minor.
        found: i32,
        /// What the kernels need.
        needed: i32,
    },
    /// The driver sees no GPU, or the environment hides them all.
    #[error("no CUDA device is visible")]
    NoDevice,
    /// A number past the last device.
    #[error("there is no CUDA device {ordinal}: {count} visible")]
    NoSuchDevice {
        /// The number asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// A GPU from before Ampere.
    #[error("{name} has compute capability {}.{}, at least 8.0 is needed", capability.0, capability.1)]
    DeviceTooOld {
        /// The GPU.
        name: String,
        /// Major and minor.
        capability: (u32, u32),
    },
    /// An allocation that does not fit.
    #[error(
        "out of GPU memory: {:.2} GiB asked for, {:.2} GiB free of {:.2} GiB",
        gib(*wanted_bytes), gib(*free_bytes), gib(*total_bytes)
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted_bytes: usize,
        /// Bytes free at that time.
        free_bytes: usize,
        /// Bytes of the device.
        total_bytes: usize,
    },
    /// What the kernels cannot do.
    #[error("{what}: {found} is more than the {max} that the CUDA kernels support")]
    Unsupported {
        /// What was measured.
        what: &'static str,
        /// Its value.
        found: usize,
        /// The largest that works.
        max: usize,
    },
    /// Matrices of one call that should have one element type.
    #[error("{what} are of different element types, which the CUDA kernels do not take")]
    MixedTypes {
        /// Which matrices.
        what: &'static str,
    },
    /// Lengths that do not fit each other.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The driver refused; after some of its answers the device is lost to this process.
    #[error("{action}: {code}: {text}")]
    Driver {
        /// What was tried.
        action: &'static str,
        /// The driver's name for it.
        code: String,
        /// The driver's words.
        text: String,
    },
    /// cuBLASLt refused.
    #[error("{action}: {status}")]
    Cublas {
        /// What was tried.
        action: &'static str,
        /// The library's status.
        status: String,
    },
}

impl CudaError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotBuiltIn => Some(
                "build again with nvcc on the PATH, or run kernels/cuda/install-nvcc.sh first; or use --device cpu",
            ),
            Self::NoDriver => Some("install the NVIDIA driver, or use --device cpu"),
            Self::DriverStart(_) | Self::NoDevice => Some(
                "nvidia-smi lists what the driver sees; CUDA_VISIBLE_DEVICES hides devices; or use --device cpu",
            ),
            Self::DriverTooOld { .. } => Some("update the NVIDIA driver, or use --device cpu"),
            Self::NoSuchDevice { .. } => Some("--list-devices shows the numbers"),
            Self::DeviceTooOld { .. } | Self::Unsupported { .. } | Self::MixedTypes { .. } => {
                Some("use --device cpu")
            }
            Self::OutOfMemory { .. } => {
                Some("lower -c/--ctx-size, end other programs on the GPU, or use --device cpu")
            }
            Self::Shape(_) | Self::Driver { .. } | Self::Cublas { .. } => None,
        }
    }
}

fn gib(n_bytes: usize) -> f64 {
    n_bytes as f64 / (1u64 << 30) as f64
}

/// Adds what was tried to the driver's answer.
pub(super) trait Context<T> {
    fn during(self, action: &'static str) -> Result<T, CudaError>;
}

impl<T> Context<T> for Result<T, DriverError> {
    fn during(self, action: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| {
            let DriverError(code) = error;
            if code == CUresult::CUDA_ERROR_NO_DEVICE {
                return CudaError::NoDevice;
            }
            let text = error.error_string().map_or_else(
                |_| "the driver has no words for it".into(),
                |text| text.to_string_lossy().into_owned(),
            );
            CudaError::Driver { action, code: format!("{code:?}"), text }
        })
    }
}
