//! Weights of a mapped file brought to where a device reads them: copied through page-locked memory at the speed of
//! the bus, or used where they lie, on devices that share the host's memory.
//!
//! ```text
//! free buffers ──▶ readers, several threads ──▶ filled buffers ──▶ this thread starts their copies
//!      ▲                                                                     │
//!      └───────────────── this thread, once a copy has ended ◀───────────────┘
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

use crate::shape::check;

use super::{Buffer, CudaError, Device, HostBuffer, Mapped, View};

/// Bytes of a page-locked buffer: some twenty microseconds of copying, more than starting it takes; all of them together
/// stay in a processor's cache between a reader and the device.
const CHUNK_BYTES_MAX: usize = 1 << 20;
const CHUNK_BYTES_MIN: usize = 64 << 10;
/// Most threads that read. One reads some 6 GB/s, eight 36, twelve 42; sixteen were no faster.
const READERS_MAX: usize = 12;
/// Buffers for each reader: one is filled while another is copied.
const BUFFERS_PER_READER: usize = 2;

/// How a device gets to bytes of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// A copy in the device's memory.
    Copied,
    /// The host's own pages.
    InPlace,
}

/// How a copy is cut and shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadPlan {
    /// Threads that read.
    pub n_readers: usize,
    /// Page-locked buffers, at least one more than readers.
    pub n_buffers: usize,
    /// Bytes of a buffer.
    pub chunk_bytes: usize,
}

impl UploadPlan {
    /// What was fastest for `len_bytes`.
    pub fn new(len_bytes: usize) -> Self {
        let n_readers = thread::available_parallelism().map_or(1, usize::from).clamp(1, READERS_MAX);
        let n_buffers = n_readers * BUFFERS_PER_READER;
        // Less for a small model: locking memory takes time as well.
        let chunk_bytes = (len_bytes / (4 * n_buffers)).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX);
        Self { n_readers, n_buffers, chunk_bytes }
    }
}

/// Reads `buffer.len()` bytes from an offset on. Called by several threads at a time.
pub type ReadAt<'a> = dyn Fn(usize, &mut [u8]) -> io::Result<()> + Sync + 'a;

/// Bytes of the host that a device reads, at the same offsets.
#[derive(Debug)]
pub struct Mirror<'m> {
    bytes: &'m [u8],
    memory: Memory<'m>,
}

#[derive(Debug)]
enum Memory<'m> {
    Copied(Buffer),
    InPlace(Mapped<'m>),
}

/// Why bytes do not get to a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UploadError {
    /// The device refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The bytes cannot be read, such as those of a file that has become shorter.
    #[error("cannot read {len_bytes} bytes from offset {offset_bytes} on")]
    Read {
        /// Where they begin.
        offset_bytes: usize,
        /// How many.
        len_bytes: usize,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl<'m> Mirror<'m> {
    /// Brings `bytes` to `device`: as `placement` says, or without one in place where the device shares the host's
    /// memory and can lock these pages, copied elsewhere. A copy asks `read` for the bytes and leaves `bytes` alone, so
    /// that a file cut short is an error. `progress` hears how many bytes are on their way, on the calling thread.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with the sizes, [`UploadError::Read`].
    pub fn new(
        device: &Device,
        bytes: &'m [u8],
        read: &ReadAt<'_>,
        placement: Option<Placement>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, UploadError> {
        if placement == Some(Placement::InPlace) || (placement.is_none() && device.info().integrated) {
            match device.map_host(bytes) {
                Ok(mapped) => {
                    progress(bytes.len());
                    return Ok(Self { bytes, memory: Memory::InPlace(mapped) });
                }
                Err(error) if placement.is_some() => return Err(error.into()),
                // Some systems do not lock pages of files.
                Err(_) => {}
            }
        }
        let buffer = device.alloc(bytes.len())?;
        upload(device, buffer.view(), &UploadPlan::new(bytes.len()), read, progress)?;
        Ok(Self { bytes, memory: Memory::Copied(buffer) })
    }

    /// How the device gets to the bytes.
    pub fn placement(&self) -> Placement {
        match self.memory {
            Memory::Copied(_) => Placement::Copied,
            Memory::InPlace(_) => Placement::InPlace,
        }
    }

    /// `part` of the bytes, as the device sees it.
    ///
    /// # Panics
    /// If `part` is not a part of them.
    pub fn view<T>(&self, part: &[T]) -> View<'_> {
        self.find(part).expect("a part of the bytes")
    }

    /// `part` of the bytes, as the device sees it; none if it lies elsewhere.
    pub fn find<T>(&self, part: &[T]) -> Option<View<'_>> {
        let offset_bytes = part.as_ptr().addr().wrapping_sub(self.bytes.as_ptr().addr());
        let end = offset_bytes.checked_add(size_of_val(part))?;
        let all = match &self.memory {
            Memory::Copied(buffer) => buffer.view(),
            Memory::InPlace(mapped) => mapped.view(),
        };
        (end <= all.len_bytes()).then(|| all.slice(offset_bytes, size_of_val(part)))
    }
}

/// A buffer with bytes for the device, from `offset_bytes` on.
struct Filled {
    buffer: HostBuffer,
    offset_bytes: usize,
    len_bytes: usize,
}

/// Copies what `read` reads to all of `to`, as `plan` says; returns when it has arrived.
///
/// # Errors
/// [`UploadError`]; [`CudaError::Shape`] for a plan without readers, bytes, or a buffer to spare.
pub fn upload(
    device: &Device,
    to: View<'_>,
    plan: &UploadPlan,
    read: &ReadAt<'_>,
    progress: &mut dyn FnMut(usize),
) -> Result<(), UploadError> {
    let UploadPlan { n_readers, n_buffers, chunk_bytes } = *plan;
    for (what, least, found) in [
        ("readers of an upload, at least", 1, n_readers),
        ("buffers of an upload, at least", n_readers + 1, n_buffers),
        ("bytes of a buffer of an upload, at least", 1, chunk_bytes),
    ] {
        check(what, found.max(least), found).map_err(CudaError::from)?;
    }
    let (free, to_fill) = channel();
    let (filled, to_copy) = channel();
    let offsets = Mutex::new((0..to.len_bytes()).step_by(chunk_bytes));
    let to_fill = Mutex::new(to_fill);
    thread::scope(|scope| {
        for _ in 0..n_readers {
            let filled = filled.clone();
            scope.spawn(|| fill(&offsets, to.len_bytes(), read, &to_fill, filled));
        }
        drop(filled);
        let mut copied = VecDeque::new();
        let new_buffers = (0..n_buffers).map(|_| device.alloc_host(chunk_bytes));
        let n_under_way_max = n_buffers - n_readers;
        let started =
            start_copies(device, to, &to_copy, free, new_buffers, n_under_way_max, &mut copied, progress);
        // Before the buffers go: a copy may be under way, also where another could not be started.
        let arrived = device.synchronize();
        // Readers find that nobody waits for them any more.
        drop(to_copy);
        started.and(arrived.map_err(UploadError::from))
    })
}

/// A reader: fills buffers until there are no more offsets, or nobody wants them.
fn fill(
    offsets: &Mutex<impl Iterator<Item = usize>>,
    len_bytes: usize,
    read: &ReadAt<'_>,
    free: &Mutex<Receiver<HostBuffer>>,
    filled: Sender<Result<Filled, UploadError>>,
) {
    loop {
        // In one step, so that buffers go out in the order of the offsets.
        let (mut buffer, offset_bytes) = {
            let free = free.lock().expect("no reader panics");
            let Ok(buffer) = free.recv() else { return };
            let Some(offset_bytes) = offsets.lock().expect("no reader panics").next() else { return };
            (buffer, offset_bytes)
        };
        let len_bytes = buffer.bytes().len().min(len_bytes - offset_bytes);
        let result = match read(offset_bytes, &mut buffer.bytes_mut()[..len_bytes]) {
            Ok(()) => Ok(Filled { buffer, offset_bytes, len_bytes }),
            Err(source) => Err(UploadError::Read { offset_bytes, len_bytes, source }),
        };
        if filled.send(result).is_err() {
            return;
        }
    }
}

/// Starts the copies of filled buffers and gives buffers back, and makes new ones as long as none is filled. Those of the
/// last copies, at most `n_copies_max`, stay in `copied`, as they may still be under way.
#[expect(clippy::too_many_arguments, reason = "what two loops share")]
fn start_copies(
    device: &Device,
    to: View<'_>,
    filled: &Receiver<Result<Filled, UploadError>>,
    free: Sender<HostBuffer>,
    mut new_buffers: impl Iterator<Item = Result<HostBuffer, CudaError>>,
    n_copies_max: usize,
    copied: &mut VecDeque<HostBuffer>,
    progress: &mut dyn FnMut(usize),
) -> Result<(), UploadError> {
    let mut ends = VecDeque::new();
    let mut n_bytes = 0;
    loop {
        let next = match filled.try_recv() {
            Err(TryRecvError::Empty) => match new_buffers.next() {
                Some(buffer) => {
                    // Nobody takes it once every reader has ended.
                    let _ = free.send(buffer?);
                    continue;
                }
                None => filled.recv().map_err(TryRecvError::from),
            },
            next => next,
        };
        // Disconnected: the last reader has ended.
        let Ok(next) = next else { return Ok(()) };
        let Filled { buffer, offset_bytes, len_bytes } = next?;
        let part = to.slice(offset_bytes, len_bytes);
        // SAFETY: the buffer goes to `copied`, and leaves it once an event after the copy has passed, or when the caller
        // has waited for the device.
        let started = unsafe { device.write_later(part, &buffer) };
        copied.push_back(buffer);
        started?;
        ends.push_back(device.record()?);
        n_bytes += len_bytes;
        progress(n_bytes);
        if ends.len() >= n_copies_max
            && let Some(end) = ends.pop_front()
        {
            end.wait()?;
            let _ = copied.pop_front().map(|buffer| free.send(buffer));
        }
    }
}
