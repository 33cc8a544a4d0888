//! Worker threads that persist, for parallel loops of a few microseconds.
//!
//! One atomic word, the ticket, holds the number of chunks and the next one to take. Taking a chunk is one
//! `fetch_add`; the caller takes chunks like everybody else and then waits only for those that somebody took, so a
//! worker that the system does not schedule delays nobody:
//!
//! ```text
//! run:    job = f; pending = n; ticket = (n, 0); work(); while pending > 0 { spin }
//! work:   while ticket.next < ticket.n { take i = ticket.next++; if i < n { job(i); pending -= 1 } }
//! worker: loop { work(); spin for SPIN; park until a ticket is published }
//! ```
//!
//! A loop that starts while another is running (from another thread, or from inside a chunk) runs on its caller alone.
//! Deliberately absent: allocation in `run`, work stealing, affinity.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than the serial parts of a decode step.
const SPIN: Duration = Duration::from_micros(100);
/// Pauses between two looks at the clock.
const PAUSES: usize = 32;
/// Spins of the caller before it yields to threads that may hold the chunk it waits for.
const CALLER_SPINS: usize = 1 << 12;
/// Bits of a ticket that hold the next chunk.
const NEXT_BITS: u32 = 32;

type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// A pointer that chunks on several threads write through, each to its own part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared<T>(*mut T);

impl<T> Shared<T> {
    pub(super) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    pub(super) fn get(&self) -> *mut T {
        self.0
    }

    /// The `len` values at `start`.
    ///
    /// # Safety
    /// They lie in the slice this was made from, which is still borrowed, and nobody else uses them meanwhile.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

// SAFETY: it is only an address; every use of it is unsafe and promises disjointness.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

/// On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

struct State {
    ticket: Line<AtomicU64>,
    pending: Line<AtomicUsize>,
    /// Written by the caller of `run` while no chunk is pending; read by those who took a chunk that is.
    job: UnsafeCell<Option<*const Job<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    n_parked: AtomicUsize,
    stop: AtomicBool,
    park: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only field that is not Sync, and the protocol of the module keeps its writes (nothing pending)
// apart from its reads (something pending); the job itself is Sync.
unsafe impl Sync for State {}
// SAFETY: the pointer in `job` is dereferenced only while `run` keeps what it points to borrowed.
unsafe impl Send for State {}

/// The worker threads.
pub(super) struct Pool {
    state: Arc<State>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the one loop that uses the workers.
    running: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("n_workers", &self.workers.len()).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `n_threads - 1` workers; where the system refuses one, the pool is smaller.
    pub(super) fn new(n_threads: usize) -> Self {
        let state = Arc::new(State {
            ticket: Line::default(),
            pending: Line::default(),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            n_parked: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            park: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..n_threads)
            .map_while(|idx| {
                let state = Arc::clone(&state);
                let builder = std::thread::Builder::new().name(format!("kernel-{idx}"));
                builder.spawn(move || worker(&state)).ok()
            })
            .collect();
        Self { state, workers, running: Mutex::new(()) }
    }

    /// Threads, the caller's included.
    pub(super) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)` to `f(n_chunks - 1)`, each once, in any order and on any thread; returns when all have returned.
    ///
    /// # Panics
    /// With the panic of a chunk, once no thread runs another chunk.
    pub(super) fn run(&self, n_chunks: usize, f: &Job<'_>) {
        if n_chunks <= 1 || self.workers.is_empty() {
            return (0..n_chunks).for_each(f);
        }
        let running = match self.running.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..n_chunks).for_each(f),
        };
        // The ticket has room for 2^32 chunks; a longer loop runs in parts.
        let part = (1 << NEXT_BITS) - (1 << 16);
        let mut start = 0;
        while start < n_chunks {
            let n = part.min(n_chunks - start);
            if start == 0 {
                self.run_part(n, f, &running);
            } else {
                self.run_part(n, &|i| f(start + i), &running);
            }
            start += n;
        }
    }

    fn run_part(&self, n_chunks: usize, f: &Job<'_>, _running: &MutexGuard<'_, ()>) {
        let state = &*self.state;
        // SAFETY: only the lifetime changes. Nobody uses the pointer after this function: it returns (and it does
        // not unwind before) when every chunk has been run, and only who took a chunk reads the pointer.
        let job = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(f) };
        // SAFETY: nothing is pending and `running` is held, so nobody else reads or writes the cell.
        unsafe { *state.job.get() = Some(job) };
        state.pending.0.store(n_chunks, Ordering::Relaxed);
        // SeqCst here and at `n_parked`: either this thread sees the worker parked, or the worker sees the ticket.
        state.ticket.0.store((n_chunks as u64) << NEXT_BITS, Ordering::SeqCst);
        if state.n_parked.load(Ordering::SeqCst) > 0 {
            // Taking the lock waits for a worker that is between its last look at the ticket and its sleep.
            drop(lock(&state.park));
            state.wake.notify_all();
        }
        work(state);
        let mut n_spins = 0;
        while state.pending.0.load(Ordering::Acquire) > 0 {
            n_spins += 1;
            if n_spins < CALLER_SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panic = lock(&state.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.state.park));
        self.state.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its chunks and has no others to report.
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True while the ticket has chunks that nobody took.
fn has_chunks(ticket: u64) -> bool {
    (ticket & ((1 << NEXT_BITS) - 1)) < ticket >> NEXT_BITS
}

/// Runs chunks until none is left to take.
fn work(state: &State) {
    while has_chunks(state.ticket.0.load(Ordering::Relaxed)) {
        // The word may be that of a later loop by now: what counts is what `fetch_add` returns. It reads the store
        // of the caller or a later value of the same release sequence, so the job is visible.
        let ticket = state.ticket.0.fetch_add(1, Ordering::Acquire);
        if !has_chunks(ticket) {
            return;
        }
        let chunk = (ticket & ((1 << NEXT_BITS) - 1)) as usize;
        // SAFETY: the chunk taken is pending until the decrement below; until then `run` keeps the cell as it is and
        // the job borrowed.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe {
            if let Some(job) = *state.job.get() {
                (*job)(chunk);
            }
        }));
        if let Err(panic) = result {
            lock(&state.panic).get_or_insert(panic);
        }
        state.pending.0.fetch_sub(1, Ordering::Release);
    }
}

fn worker(state: &State) {
    while !state.stop.load(Ordering::Relaxed) {
        work(state);
        let start = Instant::now();
        while !wanted(state, Ordering::Relaxed) && start.elapsed() < SPIN {
            for _ in 0..PAUSES {
                std::hint::spin_loop();
                if wanted(state, Ordering::Relaxed) {
                    break;
                }
            }
        }
        if wanted(state, Ordering::Relaxed) {
            continue;
        }
        let mut guard = lock(&state.park);
        state.n_parked.fetch_add(1, Ordering::SeqCst);
        while !wanted(state, Ordering::SeqCst) {
            guard = state.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        state.n_parked.fetch_sub(1, Ordering::SeqCst);
    }
}

fn wanted(state: &State, ordering: Ordering) -> bool {
    has_chunks(state.ticket.0.load(ordering)) || state.stop.load(ordering)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `n` chunks and checks that each ran once.
    fn check_once(pool: &Pool, n: usize) {
        let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
        pool.run(n, &|i| {
            hits[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(hits.iter().all(|hits| hits.load(Ordering::Relaxed) == 1), "{n} chunks");
    }

    #[test]
    fn every_chunk_runs_once_whatever_the_threads() {
        for n_threads in [1, 2, 3, 8] {
            let pool = Pool::new(n_threads);
            assert_eq!(pool.n_threads(), n_threads);
            for round in 0..2_000 {
                check_once(&pool, round % 37);
            }
            check_once(&pool, 10_000);
        }
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            std::thread::sleep(2 * SPIN);
            check_once(&pool, 16);
        }
    }

    #[test]
    fn loops_inside_chunks_and_on_other_threads_run_too() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        pool.run(7, &|i| {
            pool.run(i, &|j| {
                sum.fetch_add(j + 1, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), (0..7).map(|i| i * (i + 1) / 2).sum());
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..500).for_each(|round| check_once(&pool, round % 11)));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        for n_threads in [1, 2, 8] {
            let pool = Pool::new(n_threads);
            for bad in [0, 3, 9] {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(10, &|i| assert!(i != bad, "chunk {i}"));
                }));
                let panic = result.expect_err("the panic is lost");
                assert_eq!(*panic.downcast::<String>().unwrap(), format!("chunk {bad}"));
                check_once(&pool, 100);
            }
        }
    }
}
