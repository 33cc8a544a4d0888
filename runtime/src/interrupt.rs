//! How a user ends a run.

use std::io;

/// Calls `f` on a thread of its own each time that the process is asked to end: by Ctrl-C, and on Unix by SIGTERM or a
/// terminal that closes (SIGHUP). A process started to outlive its terminal, as `nohup` starts one, still does.
///
/// # Errors
/// A second call in the same process, or a system that refuses.
pub fn on_interrupt(f: impl FnMut() + Send + 'static) -> io::Result<()> {
    #[cfg(unix)]
    let outlives_terminal = is_hangup_ignored();
    ctrlc::set_handler(f).map_err(io::Error::other)?;
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
