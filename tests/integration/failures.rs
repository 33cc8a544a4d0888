//! Interruptions and hostile surroundings: killed runs, full disks, read-only folders, cut files, closed pipes.

use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use integration_tests::{binary, bundled_model, bundled_sinf, expect_error, expect_success, prep, runtime};

/// Kills conversions at several moments: OUT never appears half-written, and a later run succeeds over the remains.
#[test]
fn a_killed_conversion_never_leaves_an_out_file() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    let mut killed = 0;
    for delay_ms in [1, 5, 10, 20, 40, 80, 160, 320] {
        let mut child =
            prep().arg("convert").arg(bundled_model()).arg(&out).arg("--quiet").spawn().expect("prep starts");
        std::thread::sleep(Duration::from_millis(delay_ms));
        child.kill().expect("killed");
        let status = child.wait().expect("reaped");
        if status.signal() == Some(9) {
            killed += 1;
            assert!(!out.exists(), "killed after {delay_ms} ms, yet OUT exists");
        } else {
            assert!(status.success());
            std::fs::remove_file(&out).expect("a finished conversion wrote OUT");
        }
    }
    assert!(killed > 0, "no run was killed in time");
    expect_success(prep().arg("convert").arg(bundled_model()).arg(&out).arg("--quiet"));
    expect_success(prep().arg("verify").arg(&out));
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 1, "OUT.partial is gone");
}

/// A limit on the file size stands for a full disk: the write fails in the middle of the weights.
#[test]
fn a_full_disk_is_a_clear_error_without_debris() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    let mut shell = Command::new("bash");
    shell.arg("-c").arg("trap '' XFSZ; ulimit -f 4000; exec \"$0\" \"$@\"").arg(binary("prep"));
    let error = expect_error(shell.arg("convert").arg(bundled_model()).arg(&out).arg("--quiet"), 1);
    assert!(error.contains("out.sinf"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0, "debris was left");
}

#[test]
fn a_read_only_folder_is_a_clear_error() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o555)).expect("read-only");
    let mut command = prep();
    command.arg("convert").arg(bundled_model()).arg(&out).arg("--quiet");
    if std::fs::write(folder.path().join("probe"), "").is_ok() {
        // Root may write anywhere: give the right up for the child.
        std::fs::remove_file(folder.path().join("probe")).expect("removed");
        command.uid(65534).gid(65534);
    }
    let error = expect_error(&mut command, 1);
    assert!(error.contains("out.sinf") && error.to_lowercase().contains("permission denied"), "{error}");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("writable again");
}

#[test]
fn a_missing_or_foreign_file_is_a_clear_error() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let error = expect_error(runtime().arg(folder.path().join("absent.sinf")).args(["-p", "x"]), 1);
    assert!(error.contains("absent.sinf"), "{error}");
    let foreign = folder.path().join("foreign.sinf");
    for content in [&b""[..], b"GGUF", &[0; 4096]] {
        std::fs::write(&foreign, content).expect("written");
        let error = expect_error(runtime().arg(&foreign).args(["-p", "x"]), 1);
        assert!(error.contains("foreign.sinf"), "{error}");
    }
    let error = expect_error(runtime().arg(bundled_model()).args(["-p", "x"]), 1);
    assert!(error.contains("prep convert"), "a model folder gets a hint: {error}");
}

/// The file cut at a hundred places spread by a multiplicative sequence: always an error that names the file.
#[test]
fn a_cut_file_is_an_error_wherever_it_is_cut() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("cut.sinf");
    let bytes = std::fs::read(bundled_sinf()).expect("the converted model");
    let mut at: u64 = 1;
    for _ in 0..100 {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let len = (at >> 11) as usize % bytes.len();
        std::fs::write(&path, &bytes[..len]).expect("written");
        let error = expect_error(runtime().arg(&path).args(["-p", "The", "-n", "1"]), 1);
        assert!(error.contains("cut.sinf"), "cut at {len}: {error}");
    }
}

#[test]
fn stdout_closed_is_a_quiet_end() {
    let mut child = runtime()
        .arg(bundled_sinf())
        .args(["-p", "The Linux kernel", "-n", "300", "--ignore-eos", "--temp", "0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runtime starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("reaped");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{stderr}");
    assert_eq!(output.status.code(), Some(0), "{stderr}");
}

#[test]
fn stdin_gives_the_prompt_and_may_be_closed() {
    let mut child = runtime()
        .arg(bundled_sinf())
        .args(["-f", "-", "-n", "4", "--temp", "0", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runtime starts");
    child.stdin.take().expect("piped").write_all(b"The Linux kernel").expect("written");
    let output = child.wait_with_output().expect("reaped");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["prompt_ids"], serde_json::json!([1, 325, 3299, 2064]));

    // Closed at once: an empty prompt, which generates from BOS alone.
    let output = expect_success(runtime().arg(bundled_sinf()).args(["-f", "-", "-n", "4", "--json"]));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["prompt_ids"], serde_json::json!([1]));
}

#[test]
fn a_text_that_cannot_be_measured_is_named() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let text = folder.path().join("text.txt");
    for (content, found) in [(&b""[..], "0 tokens"), (b"one\xff", "invalid utf-8")] {
        std::fs::write(&text, content).expect("written");
        let error = expect_error(runtime().arg(bundled_sinf()).arg("--perplexity").arg(&text), 1);
        assert!(error.contains("text.txt: ") && error.contains(found), "{error}");
    }
}

/// What becomes of a generation that gets `signal` while its text comes.
fn signalled(command: &mut Command, signal: libc::c_int) -> Output {
    let forget_nohup = || {
        // SAFETY: sets a disposition, as is allowed between fork and exec. These tests may run under nohup themselves.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: see above.
    unsafe { command.pre_exec(forget_nohup) };
    let mut child = command
        .arg(bundled_sinf())
        .args(["-p", "The", "-n", "500", "--ignore-eos", "--temp", "0", "-t", "1"])
        .args(["--predictor", "dense", "--no-display-prompt"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runtime starts");
    // Wait for the first bytes of text, so that the handler is in place and generation is under way.
    let mut first = [0; 1];
    std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut first).expect("text comes");
    let started = Instant::now();
    // SAFETY: sends a signal to a child that nobody has reaped. A program that does so starts too late on a busy machine.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
    let output = child.wait_with_output().expect("reaped");
    assert!(started.elapsed() < Duration::from_secs(10));
    output
}

/// Ctrl-C: the text so far stands, the statistics follow, the exit code is 130.
#[test]
fn an_interrupt_ends_cleanly_with_statistics() {
    for signal in [libc::SIGINT, libc::SIGHUP] {
        let output = signalled(&mut runtime(), signal);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{signal}: {stderr}");
        assert!(stderr.contains("tok/s"), "no statistics: {stderr}");
    }
}

/// As `nohup` starts it: a terminal that closes does not end the run.
#[test]
fn a_run_that_ignores_hangups_outlives_its_terminal() {
    let mut command = Command::new("sh");
    command.args(["-c", r#"trap "" HUP; exec "$0" "$@""#]).arg(binary("runtime"));
    let output = signalled(&mut command, libc::SIGHUP);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("500 tokens, ended by length"), "{stderr}");
}
