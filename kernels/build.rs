//! Compiles `cuda/kernels.cu` with nvcc into one fat binary for the library to embed.
//!
//! nvcc is `SINF_NVCC`, or `bin/nvcc` of `CUDA_HOME` or `CUDA_PATH`, or the `nvcc` of `PATH`. Without one the library is
//! built without kernels, which this script says once; `SINF_REQUIRE_CUDA=1` makes that an error. `SINF_CUDA_ARCHS`
//! (such as `90a`) narrows the targets, for quicker builds while a kernel is being written. `SINF_CUDA_CACHE`, an absolute
//! folder, keeps what nvcc made under a name drawn from everything it was made of, so that builds with other profiles or
//! features take it from there; nothing is ever removed from it.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Output};

/// Every compute capability since Ampere that has machine code of its own; later ones start from the PTX of the last,
/// without what is that architecture's alone: Hopper's matrix instructions are in `90a`.
const ARCHS: &str = "80,86,87,89,90a";
const SOURCES: &str = "cuda";
/// Read by nvcc itself, besides its command line.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"];
/// `SINF_CUDA_CACHE` is not among them: it changes how long a build takes, not what it makes.
const VARIABLES: [&str; 6] =
    ["SINF_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "SINF_CUDA_ARCHS", "SINF_REQUIRE_CUDA"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SOURCES}");
    for variable in VARIABLES.iter().chain(&NVCC_VARIABLES) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let image = match find_nvcc() {
        Some(nvcc) => {
            let fatbin = out.join("kernels.fatbin");
            make_image(&nvcc, &fatbin);
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
    fs::write(out.join("cuda_image.rs"), text).expect("OUT_DIR can be written");
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

/// Compiles the kernels into `fatbin`, or copies them from the cache.
fn make_image(nvcc: &Path, fatbin: &Path) {
    let arguments = arguments();
    let Some(cache) = env::var_os("SINF_CUDA_CACHE").filter(|folder| !folder.is_empty()) else {
        return compile(nvcc, &arguments, fatbin);
    };
    // Cargo runs this script in the package's folder, where a relative one would surprise.
    let cache = PathBuf::from(cache);
    assert!(cache.is_absolute(), "SINF_CUDA_CACHE is {}, which is not absolute", cache.display());
    let cached = cache.join(format!("{:016x}.fatbin", fingerprint(nvcc, &arguments)));
    if fs::copy(&cached, fatbin).is_ok() {
        return;
    }
    compile(nvcc, &arguments, fatbin);
    // Renamed when complete: builds that run at the same time see all of it or nothing.
    let partial = cached.with_extension(format!("{}.partial", process::id()));
    fs::create_dir_all(&cache)
        .and_then(|()| fs::copy(fatbin, &partial))
        .and_then(|_| fs::rename(&partial, &cached))
        .unwrap_or_else(|error| panic!("cannot write to SINF_CUDA_CACHE, {}: {error}", cache.display()));
}

/// nvcc's command line, less the file to write.
fn arguments() -> Vec<String> {
    let archs = env::var("SINF_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let archs: Vec<&str> = archs.split(',').map(str::trim).filter(|arch| !arch.is_empty()).collect();
    let last = archs.last().expect("SINF_CUDA_ARCHS names a target").trim_end_matches('a');
    let mut arguments: Vec<String> =
        ["-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings"].map(Into::into).into();
    // Line tables make most of the image: a ninth of the size, unpacked by the driver when a device is opened.
    arguments.extend(["-fatbin", "--compress-mode=size"].map(Into::into));
    // As many targets at a time as there are processors.
    arguments.extend(["--threads", "0"].map(Into::into));
    arguments.extend(archs.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")));
    arguments.push(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    arguments.push(format!("{SOURCES}/kernels.cu"));
    arguments
}

/// Of all that an image is made of: compiler, what it is told, and every source with its name.
fn fingerprint(nvcc: &Path, arguments: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (nvcc, run(Command::new(nvcc).arg("--version")).stdout, arguments).hash(&mut hasher);
    NVCC_VARIABLES.map(env::var_os).hash(&mut hasher);
    let entries = fs::read_dir(SOURCES).expect("the package has its sources");
    let mut sources: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    sources.sort();
    for source in sources {
        let text = fs::read(&source).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
        (source, text).hash(&mut hasher);
    }
    hasher.finish()
}

fn compile(nvcc: &Path, arguments: &[String], fatbin: &Path) {
    run(Command::new(nvcc).args(arguments).arg("-o").arg(fatbin));
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
