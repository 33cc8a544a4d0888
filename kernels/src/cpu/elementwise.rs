//! Operations on single vectors: a row of weights as f32, RMSNorm, rotary embedding.
//!
//! Computes   reference::{rmsnorm, rope}; row is exact
//! Lanes      rmsnorm sums squares in CHAINS chains, then as a tree, then the lanes
//! Tail       partial vectors; the sum's go into the first chain

use super::Isa;
use super::decode::{dispatch, with_elements};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Element, Lanes, Portable, load_partial, store_partial};
use crate::Matrix;

const CHAINS: usize = 4;

macro_rules! entries {
    ($isa:ident, $lanes:ty $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            /// # Safety
            /// The processor has the instruction set; the row exists and is as wide as `out`.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn row(w: &Matrix<'_>, row: usize, out: &mut [f32]) {
                // SAFETY: the caller's promise.
                unsafe {
                    with_elements!(w.data, w => convert::<$lanes, _>(w.add(row * out.len()), out));
                }
            }
            /// # Safety
            /// The processor has the instruction set; the slices are equally long.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                // SAFETY: the caller's promise.
                unsafe { super::rmsnorm_lanes::<$lanes>(x, weight, eps, out) }
            }
            /// # Safety
            /// The processor has the instruction set; `heads` are whole heads, twice as wide as `cos` and `sin`.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
                // SAFETY: the caller's promise.
                unsafe { super::rope_lanes::<$lanes>(heads, cos, sin) }
            }
        }
    };
}
entries!(portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");

/// `out = w[row]`; the row exists and is as wide as `out`.
pub(super) fn row(isa: Isa, w: &Matrix<'_>, row: usize, out: &mut [f32]) {
    dispatch!(isa, row, w, row, out);
}

/// RMSNorm of one vector; the slices are equally long.
pub(super) fn rmsnorm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    dispatch!(isa, rmsnorm, x, weight, eps, out);
}

/// Rotates whole heads, twice as wide as `cos` and `sin`.
pub(super) fn rope(isa: Isa, heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    dispatch!(isa, rope, heads, cos, sin);
}

/// # Safety
/// `out.len()` elements at `src`; the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn convert<L: Lanes, T: Element>(src: *const T, out: &mut [f32]) {
    let mut i = 0;
    while i < out.len() {
        let n = L::N.min(out.len() - i);
        // SAFETY: `n` elements from `i` lie in both.
        unsafe { store_partial::<L>(out.as_mut_ptr().add(i), n, load_partial::<L, T>(src.add(i), n)) };
        i += n;
    }
}

/// # Safety
/// The slices are equally long; the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn rmsnorm_lanes<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = x.len();
    let (x, weight, out) = (x.as_ptr(), weight.as_ptr(), out.as_mut_ptr());
    // SAFETY: vectors end at or before `len`.
    unsafe {
        let mut chains = [L::splat(0.0); CHAINS];
        let mut i = 0;
        while i + CHAINS * L::N <= len {
            for (c, chain) in chains.iter_mut().enumerate() {
                let x = L::load(x.add(i + c * L::N));
                *chain = L::mul_add(x, x, *chain);
            }
            i += CHAINS * L::N;
        }
        while i < len {
            let n = L::N.min(len - i);
            let x = load_partial::<L, f32>(x.add(i), n);
            chains[0] = L::mul_add(x, x, chains[0]);
            i += n;
        }
        let sum = L::sum(L::add(L::add(chains[0], chains[1]), L::add(chains[2], chains[3])));
        let scale = L::splat(1.0 / (sum / len as f32 + eps).sqrt());
        let mut i = 0;
        while i < len {
            let n = L::N.min(len - i);
            let scaled = L::mul(load_partial::<L, f32>(x.add(i), n), scale);
            store_partial::<L>(out.add(i), n, L::mul(scaled, load_partial::<L, f32>(weight.add(i), n)));
            i += n;
        }
    }
}

/// # Safety
/// `heads` are whole heads, twice as wide as `cos` and `sin`; the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn rope_lanes<L: Lanes>(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        let mut i = 0;
        while i < half {
            let n = L::N.min(half - i);
            // SAFETY: `n` values from `i` lie in each of the four.
            unsafe {
                let a = load_partial::<L, f32>(low.as_ptr().add(i), n);
                let b = load_partial::<L, f32>(high.as_ptr().add(i), n);
                let cos = load_partial::<L, f32>(cos.as_ptr().add(i), n);
                let sin = load_partial::<L, f32>(sin.as_ptr().add(i), n);
                store_partial::<L>(low.as_mut_ptr().add(i), n, L::sub(L::mul(a, cos), L::mul(b, sin)));
                store_partial::<L>(high.as_mut_ptr().add(i), n, L::add(L::mul(b, cos), L::mul(a, sin)));
            }
            i += n;
        }
    }
}
