//! Compiles `cuda/kernels.cu` with nvcc into one fat binary for the library to embed.
//!
//! nvcc is `SINF_NVCC`, or `bin/nvcc` of `CUDA_HOME` or `CUDA_PATH`, or the `nvcc` of `PATH`. Without one the library is
//! built without kernels, which this script says once; `SINF_REQUIRE_CUDA=1` makes that an error. `SINF_CUDA_ARCHS`
//! (such as `90a`) narrows the targets, for quicker builds while a kernel is being written.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every compute capability since Ampere that has machine code of its own; later ones start from the PTX of the last,
/// without what is that architecture's alone: Hopper's matrix instructions are in `90a`.
const ARCHS: &str = "80,86,87,89,90a";
const SOURCES: &str = "cuda";
const VARIABLES: [&str; 6] =
    ["SINF_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "SINF_CUDA_ARCHS", "SINF_REQUIRE_CUDA"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SOURCES}");
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let image = match find_nvcc() {
        Some(nvcc) => {
            let fatbin = out.join("kernels.fatbin");
            compile(&nvcc, &fatbin);
            format!("Some(include_bytes!({:?}))", fatbin.display().to_string())
        }
        None if env::var("SINF_REQUIRE_CUDA").is_ok_and(|value| value == "1") => {
            panic!(
                "SINF_REQUIRE_CUDA=1 and no nvcc: set SINF_NVCC, CUDA_HOME or PATH, or run cuda/install-nvcc.sh"
            );
        }
        None => {
            println!(
                "cargo::warning=no nvcc found: built without CUDA (kernels/cuda/install-nvcc.sh installs one)"
            );
            "None".into()
        }
    };
    let text = format!("/// The fat binary.\npub(super) const IMAGE: Option<&[u8]> = {image};\n");
    std::fs::write(out.join("cuda_image.rs"), text).expect("OUT_DIR can be written");
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("SINF_NVCC").filter(|nvcc| !nvcc.is_empty()) {
        let nvcc = PathBuf::from(nvcc);
        assert!(nvcc.is_file(), "SINF_NVCC is {}, which is no file", nvcc.display());
        return Some(nvcc);
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = homes.map(|home| Path::new(&home).join("bin")).chain(env::split_paths(&path));
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    folders.map(|folder| folder.join(&name)).find(|nvcc| nvcc.is_file())
}

fn compile(nvcc: &Path, fatbin: &Path) {
    let archs = env::var("SINF_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let archs: Vec<&str> = archs.split(',').map(str::trim).filter(|arch| !arch.is_empty()).collect();
    let last = archs.last().expect("SINF_CUDA_ARCHS names a target").trim_end_matches('a');
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings"]);
    // Line tables make most of the image: a ninth of the size, unpacked by the driver when a device is opened.
    command.args(["-fatbin", "--compress-mode=size"]);
    for arch in &archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    command.arg("-o").arg(fatbin).arg(Path::new(SOURCES).join("kernels.cu"));
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {}: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "{command:?} failed\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
