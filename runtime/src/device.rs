//! Which device runs the model. Asking for one that is not there is an error, never a silent fallback.

use std::fmt;
use std::str::FromStr;

use kernels::{Cpu, cuda};

use crate::forward::measure_read_gb_per_s;

/// A device as users name it: `auto`, `cpu`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The best one there is.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A CUDA device by its index.
    Cuda(u32),
}

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The name is none.
    #[error("expected auto, cpu, cuda or cuda:N, found {0:?}")]
    Name(String),
    /// The backend is not part of this program.
    #[error("device {0} is not available: this program was built without CUDA")]
    NotBuiltIn(Device),
}

impl DeviceError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Name(_) => None,
            Self::NotBuiltIn(_) => Some("use --device cpu or --device auto"),
        }
    }
}

impl Device {
    /// That the backend is part of this program; whether the device answers shows when a session opens it.
    ///
    /// # Errors
    /// [`DeviceError::NotBuiltIn`].
    pub fn check(self) -> Result<(), DeviceError> {
        match self {
            Self::Cuda(_) if !cuda::is_built_in() => Err(DeviceError::NotBuiltIn(self)),
            Self::Auto | Self::Cpu | Self::Cuda(_) => Ok(()),
        }
    }
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Name(name.to_owned());
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let index = name.strip_prefix("cuda:").ok_or_else(unknown)?;
                // `parse` would take a sign.
                if !index.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(unknown());
                }
                index.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// One line for each device, and one for each backend that has none. With `measure`, the read bandwidth of each device,
/// which takes a second or two and needs a few GiB of its memory.
pub fn list(measure: bool) -> Vec<String> {
    std::iter::once(cpu_line(measure)).chain(cuda_lines(measure)).collect()
}

fn cpu_line(measure: bool) -> String {
    let cpu = Cpu::new(0);
    let memory = match memory_gib() {
        Some((available, total)) => format!(", {available:.1} of {total:.1} GiB memory available"),
        None => String::new(),
    };
    let reads = if measure { reads(measure_read_gb_per_s(&cpu)) } else { String::new() };
    format!("cpu     {}, {} threads{memory}{reads}", cpu.isa(), cpu.n_threads())
}

fn reads(gb_per_s: f64) -> String {
    format!(", reads {gb_per_s:.1} GB/s")
}

fn cuda_lines(measure: bool) -> Vec<String> {
    if !cuda::is_built_in() {
        return vec!["cuda    not available: this program was built without CUDA".to_owned()];
    }
    match cuda::list_devices() {
        Ok(devices) => devices
            .iter()
            .map(|device| {
                cuda_device_line(device) + &if measure { cuda_reads(device) } else { String::new() }
            })
            .collect(),
        Err(error) => vec![format!("cuda    not available: {error}")],
    }
}

fn cuda_device_line(device: &cuda::DeviceInfo) -> String {
    let gib = |n_bytes: usize| n_bytes as f64 / (1u64 << 30) as f64;
    format!(
        "cuda:{}  {}, compute capability {}.{}, {:.1} of {:.1} GiB memory free",
        device.ordinal,
        device.name,
        device.capability.0,
        device.capability.1,
        gib(device.free_bytes),
        gib(device.total_bytes)
    )
}

/// What was measured of a device, or why not: a listing goes on.
fn cuda_reads(device: &cuda::DeviceInfo) -> String {
    let measured = cuda::Device::open(device.ordinal).and_then(|device| device.measure_read_gb_per_s());
    measured.map_or_else(|error| format!(", cannot be measured: {error}"), reads)
}

/// Available and total memory in GiB, where the system says so.
fn memory_gib() -> Option<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    Some((kib_field(&text, "MemAvailable")? / 1048576.0, kib_field(&text, "MemTotal")? / 1048576.0))
}

/// The value of a line `name:   123 kB`.
fn kib_field(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (name, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:7", Device::Cuda(7)),
        ] {
            assert_eq!(name.parse(), Ok(device));
            assert_eq!(device.to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for name in ["", "CPU", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:99999999999"] {
            assert_eq!(name.parse::<Device>(), Err(DeviceError::Name(name.to_owned())));
        }
    }

    #[test]
    fn a_backend_that_is_not_built_in_is_an_error() {
        assert_eq!(Device::Auto.check(), Ok(()));
        assert_eq!(Device::Cpu.check(), Ok(()));
        let missing = Err(DeviceError::NotBuiltIn(Device::Cuda(1)));
        assert_eq!(Device::Cuda(1).check(), if cuda::is_built_in() { Ok(()) } else { missing });
    }

    #[test]
    fn meminfo_fields_are_whole_words() {
        let text = "MemTotal:       16384 kB\nMemTotalX: 1 kB\nMemFree: 7 kB\n";
        assert_eq!(kib_field(text, "MemTotal"), Some(16384.0));
        assert_eq!(kib_field(text, "Mem"), None);
        assert_eq!(kib_field("MemTotal: many kB", "MemTotal"), None);
    }
}
