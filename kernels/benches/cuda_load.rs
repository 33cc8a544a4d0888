//! Where the time of a load goes: driver, context, memory, reads, copies, and all of it by several plans.
//!
//! `cargo bench -p kernels --bench cuda_load -- FILE` reads FILE twice, so that the system has it in memory, then prints
//! each part. Of the runs of a plan it shows the best and the median.

#![expect(clippy::print_stdout, reason = "a bench prints what it measures")]

use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use kernels::cuda::{self, Device, UploadPlan, upload};

const REPEATS: usize = 5;
const MIB: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let Some(path) = std::env::args().skip(1).find(|argument| !argument.starts_with("--")) else {
        println!("cuda_load: give a large file: cargo bench -p kernels --bench cuda_load -- FILE");
        return Ok(());
    };
    let file = File::open(&path)?;
    let len_bytes = file.metadata()?.len() as usize;
    let read = |offset: usize, buffer: &mut [u8]| read_exact_at(&file, offset as u64, buffer);
    println!("{path}: {:.2} GB", len_bytes as f64 * 1e-9);

    for n_readers in [1, 4, 8, 16] {
        for chunk_bytes in [MIB, 4 * MIB] {
            let seconds = (0..2)
                .map(|_| read_all(&read, len_bytes, n_readers, chunk_bytes))
                .collect::<Result<Vec<_>, _>>()?;
            report(&format!("read, {n_readers} threads, {} MiB", chunk_bytes / MIB), len_bytes, &seconds);
        }
    }

    let started = Instant::now();
    let devices = cuda::list_devices()?;
    println!("{:<44} {:8.1} ms", "driver and a context, opened and closed", ms(started));
    println!("{:?}", devices[0]);
    let started = Instant::now();
    let device = Device::open(0)?;
    println!("{:<44} {:8.1} ms", "device opened: context, kernels", ms(started));
    let started = Instant::now();
    let memory = device.alloc(len_bytes)?;
    device.synchronize()?;
    println!("{:<44} {:8.1} ms", "device memory, cleared", ms(started));

    let started = Instant::now();
    let pinned = device.alloc_host(64 * MIB)?;
    println!("{:<44} {:8.1} ms", "64 MiB of page-locked memory", ms(started));
    let mut seconds = Vec::new();
    for _ in 0..REPEATS {
        let started = Instant::now();
        for offset in (0..len_bytes).step_by(64 * MIB) {
            let part = memory.view().slice(offset, (64 * MIB).min(len_bytes - offset));
            // SAFETY: nobody writes to `pinned`, which lives past the wait below.
            unsafe { device.write_later(part, &pinned) }?;
        }
        device.synchronize()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    report("copies alone, from page-locked memory", len_bytes, &seconds);

    let default = UploadPlan::new(len_bytes);
    let mut plans = vec![default];
    for n_readers in [4, 8, 12, 16] {
        for (n_buffers, chunk_bytes) in [(2, MIB), (3, MIB), (2, 2 * MIB), (2, 4 * MIB)] {
            plans.push(UploadPlan { n_readers, n_buffers: n_buffers * n_readers, chunk_bytes });
        }
    }
    for plan in plans {
        let mut seconds = Vec::new();
        for _ in 0..REPEATS {
            let started = Instant::now();
            upload(&device, memory.view(), &plan, &read, &mut |_| {})?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        let name = format!(
            "{} readers, {} buffers of {} KiB",
            plan.n_readers,
            plan.n_buffers,
            plan.chunk_bytes >> 10
        );
        report(&(name + if plan == default { " (default)" } else { "" }), len_bytes, &seconds);
    }
    Ok(())
}

fn ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}

/// Best and median.
fn report(name: &str, len_bytes: usize, seconds: &[f64]) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (best, median) = (sorted[0], sorted[sorted.len() / 2]);
    let gb_per_s = |seconds: f64| len_bytes as f64 * 1e-9 / seconds;
    println!(
        "{name:<44} {:8.1} ms, median {:8.1} ms: {:6.1} GB/s, median {:6.1}",
        best * 1e3,
        median * 1e3,
        gb_per_s(best),
        gb_per_s(median)
    );
}

/// Seconds that threads take to read everything into buffers of their own.
fn read_all(
    read: &(impl Fn(usize, &mut [u8]) -> io::Result<()> + Sync),
    len_bytes: usize,
    n_readers: usize,
    chunk_bytes: usize,
) -> io::Result<f64> {
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    thread::scope(|scope| {
        let reader = || {
            let mut buffer = vec![0; chunk_bytes];
            loop {
                let offset = next.fetch_add(chunk_bytes, Ordering::Relaxed);
                if offset >= len_bytes {
                    return Ok::<(), io::Error>(());
                }
                read(offset, &mut buffer[..chunk_bytes.min(len_bytes - offset)])?;
            }
        };
        let readers: Vec<_> = (0..n_readers).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("no reader panics"))
    })?;
    Ok(started.elapsed().as_secs_f64())
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
        n_read if n_read == buffer.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
