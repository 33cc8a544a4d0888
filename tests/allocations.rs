//! A decode step allocates nothing: a process of its own, as the counting allocator sees every thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use integration_tests::bundled_sinf;
use runtime::{AuditOptions, MlpMode, Model, Session, SessionOptions};

static N_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn n_allocations(f: impl FnOnce()) -> u64 {
    let before = N_ALLOCATIONS.load(Ordering::Relaxed);
    f();
    N_ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn a_decode_step_allocates_nothing() {
    assert!(n_allocations(|| drop(std::hint::black_box(Box::new(1)))) > 0, "the allocator counts");
    let model = Model::open(bundled_sinf()).expect("the converted model opens");
    let adaptive = AuditOptions { every: 1, seed: 1, adaptive: true };
    let cases = [MlpMode::Stored, MlpMode::Exact, MlpMode::Dense].map(|mode| (mode, None));
    for (mode, audit) in cases.into_iter().chain([(MlpMode::Stored, Some(adaptive))]) {
        let options =
            SessionOptions { n_positions_max: 64, n_batch_max: 8, n_threads: 2, mode, alpha_scale: 1.0 };
        let mut session = Session::new(&model, &options).expect("a session");
        session.set_audit(audit).expect("the file predicts");
        session.prefill(&[1, 325, 3299, 2064]).expect("the prompt");
        session.decode(300).expect("the first token");
        // The fewest of several stretches: a worker that the system starts late allocates while it starts.
        let fewest = (0..4)
            .map(|_| {
                n_allocations(|| {
                    for token in 301..309 {
                        session.decode(token).expect("a token");
                    }
                })
            })
            .min();
        assert_eq!(fewest, Some(0), "{mode:?}, {audit:?}: allocations in 8 decode steps");
    }
}
