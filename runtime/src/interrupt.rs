//! How a user ends a run.

use std::io;

/// Exit code of a process that its user ended, as shells give it after Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// Calls `f` on a thread of its own when the process is first asked to end: by Ctrl-C, and on Unix by SIGTERM or a terminal
/// that closes (SIGHUP). Asked again, the process ends at once. One started to outlive its terminal, as `nohup` starts it,
/// still does.
///
/// # Errors
/// A second call in the same process, or a system that refuses.
pub fn on_interrupt(f: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut first = Some(f);
    let handler = move || match first.take() {
        Some(f) => f(),
        None => std::process::exit(INTERRUPTED.into()),
    };
    #[cfg(unix)]
    let outlives_terminal = is_hangup_ignored();
    ctrlc::set_handler(handler).map_err(io::Error::other)?;
    #[cfg(unix)]
    if outlives_terminal {
        // SAFETY: sets the disposition of a signal to one that runs no code.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    }
    Ok(())
}

#[cfg(unix)]
fn is_hangup_ignored() -> bool {
    // SAFETY: all zeros are a valid value of this plain structure, which the call then fills.
    unsafe {
        let mut found: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGHUP, std::ptr::null(), &mut found) == 0
            && found.sa_sigaction == libc::SIG_IGN
    }
}
