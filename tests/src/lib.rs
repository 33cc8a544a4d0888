//! Helpers of the integration tests: the built binaries, the bundled model, scratch folders, comparisons that
//! refuse NaN.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// The workspace's root folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

/// Path of a built binary (`prep` or `runtime`), compiled on first use with the profile of the running test.
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("a running test has a path");
        let folder = test.ancestors().nth(2).expect("tests lie in PROFILE/deps").to_path_buf();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(workspace()).args(["build", "--quiet", "-p", "prep", "-p", "runtime", "--bins"]);
        cargo.arg("--target-dir").arg(folder.parent().expect("PROFILE lies in the target folder"));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let status = cargo.status().expect("cargo starts");
        assert!(status.success(), "building the binaries failed");
        folder
    });
    folder.join(name)
}

/// A command of `prep`.
pub fn prep() -> Command {
    quiet(binary("prep"))
}

/// A command of `runtime`.
pub fn runtime() -> Command {
    quiet(binary("runtime"))
}

fn quiet(program: PathBuf) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command
}

/// The bundled checkpoint.
pub fn bundled_model() -> PathBuf {
    workspace().join("tests/models/relu-llama-8m")
}

/// The bundled checkpoint, converted once with default options for all tests of this process.
pub fn bundled_sinf() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let folder = binary("prep").with_file_name("integration-models");
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let out = folder.join(format!("relu-llama-8m-{}.sinf", std::process::id()));
        expect_success(prep().arg("convert").arg(bundled_model()).arg(&out).args(["--force", "--quiet"]));
        out
    })
}

/// Larger checkpoints and texts that lie beside a development checkout, if they do. Says so on stderr when not.
#[expect(clippy::print_stderr, reason = "a check that does not run has to say so")]
pub fn shared(path: &str) -> Option<PathBuf> {
    let found = workspace().join("../shared").join(path);
    if found.exists() {
        return Some(found);
    }
    eprintln!("skipped: {path} is not beside this checkout");
    None
}

/// Runs `command` and returns what it printed; fails the test with its stderr when it does not exit with 0.
pub fn expect_success(command: &mut Command) -> Output {
    expect_code(command, 0)
}

/// Runs `command`; fails the test with its output when it does not exit with `code`.
pub fn expect_code(command: &mut Command, code: i32) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert_eq!(
        output.status.code(),
        Some(code),
        "{command:?}\nstdout: {}\nstderr: {}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// What a failed `command` says on stderr, checked to be one error chain and no panic.
pub fn expect_error(command: &mut Command, code: i32) -> String {
    let output = expect_code(command, code);
    let stderr = String::from_utf8(output.stderr).expect("stderr is UTF-8");
    assert!(!stderr.contains("panicked"), "{command:?} panicked: {stderr}");
    assert!(stderr.contains("error"), "{command:?} says no error: {stderr}");
    stderr
}

/// The JSON object that a successful `command` prints on stdout.
pub fn expect_json(command: &mut Command) -> serde_json::Value {
    let output = expect_success(command);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{command:?}: {error}: {}", String::from_utf8_lossy(&output.stdout)))
}

/// Fails when `found` is not within `tolerance` of `expected`; NaN never is.
pub fn assert_close(found: f64, expected: f64, tolerance: f64, what: &str) {
    let difference = (found - expected).abs();
    assert!(difference <= tolerance, "{what}: expected {expected} within {tolerance}, found {found}");
}
