//! Batched products of every instruction set of this machine against the reference.

use half::{bf16, f16};
use kernels::{Cpu, Elements, Isa, Matrix, reference};

/// Values in [-1, 1], the same for a seed.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Elements on each side of a slice that no product may use (they are NaN) or change.
const MARGIN: usize = 64;

fn with_margins<T: Copy>(values: impl Iterator<Item = T>, nan: T) -> Vec<T> {
    let margin = std::iter::repeat_n(nan, MARGIN);
    margin.clone().chain(values).chain(margin).collect()
}

fn inner<T>(padded: &[T]) -> &[T] {
    &padded[MARGIN..padded.len() - MARGIN]
}

/// The same weights in the three types.
struct Weights {
    n_rows: usize,
    n_cols: usize,
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

impl Weights {
    fn new(n_rows: usize, n_cols: usize) -> Self {
        let values = random(n_rows * n_cols, 1);
        Self {
            n_rows,
            n_cols,
            f16: with_margins(values.iter().map(|&v| f16::from_f32(v)), f16::NAN),
            bf16: with_margins(values.iter().map(|&v| bf16::from_f32(v)), bf16::NAN),
            f32: with_margins(values.iter().copied(), f32::NAN),
        }
    }

    fn matrices(&self) -> [Matrix<'_>; 3] {
        [Elements::F32(inner(&self.f32)), Elements::F16(inner(&self.f16)), Elements::Bf16(inner(&self.bf16))]
            .map(|data| Matrix::new(data, self.n_rows, self.n_cols).unwrap())
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Product {
    Matmul,
    MatmulT,
}

impl Product {
    const ALL: [Self; 2] = [Self::Matmul, Self::MatmulT];

    /// Widths of a row of x and of a row of y.
    fn widths(self, w: &Matrix<'_>) -> (usize, usize) {
        if self == Self::Matmul { (w.n_cols, w.n_rows) } else { (w.n_rows, w.n_cols) }
    }

    fn x(self, w: &Matrix<'_>, n_tokens: usize) -> Vec<f32> {
        with_margins(random(n_tokens * self.widths(w).0, 2).into_iter(), f32::NAN)
    }

    fn reference(self, w: &Matrix<'_>, x: &[f32]) -> Vec<f32> {
        let (n_x, n_y) = self.widths(w);
        let mut y = vec![f32::NAN; x.len() / n_x * n_y];
        match self {
            Self::Matmul => reference::matmul(w, x, &mut y),
            Self::MatmulT => reference::matmul_t(w, x, &mut y),
        }
        y
    }

    /// The product with the first `n_tokens` rows of `x`, added to `start` or written over NaN.
    fn run(self, cpu: &Cpu, w: &Matrix<'_>, n_tokens: usize, x: &[f32], start: Option<&[f32]>) -> Vec<f32> {
        let (n_x, n_y) = self.widths(w);
        let mut y = match start {
            Some(start) => with_margins(start[..n_tokens * n_y].iter().copied(), f32::NAN),
            None => vec![f32::NAN; n_tokens * n_y + 2 * MARGIN],
        };
        let y_inner = &mut y[MARGIN..MARGIN + n_tokens * n_y];
        let x = &x[..n_tokens * n_x];
        match self {
            Self::Matmul => cpu.matmul(w, n_tokens, x, y_inner, start.is_some()).unwrap(),
            Self::MatmulT => cpu.matmul_t(w, n_tokens, x, y_inner, start.is_some()).unwrap(),
        }
        let margins = y[..MARGIN].iter().chain(&y[MARGIN + n_tokens * n_y..]);
        assert!(margins.into_iter().all(|v| v.is_nan()), "{self:?} of {n_tokens} wrote outside y");
        inner(&y).to_vec()
    }
}

/// The instruction sets that this machine has.
fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// f32 sums of `n` products of values below 1, in blocks, against f64 ones; about ten times what is seen.
fn tolerance(n: usize) -> f32 {
    1e-6 + 1e-7 * n as f32
}

/// Each of `shapes`, product, type and instruction set: the result of `n_max` tokens is the reference's, and that of
/// each of `n_tokens` has the same bits, row by row.
fn check(shapes: &[(usize, usize)], n_max: usize, n_tokens: &[usize]) {
    for &(n_rows, n_cols) in shapes {
        let weights = Weights::new(n_rows, n_cols);
        for (w, product) in weights.matrices().iter().flat_map(|w| Product::ALL.map(|product| (*w, product)))
        {
            let (n_x, n_y) = product.widths(&w);
            let x = product.x(&w, n_max);
            let x = inner(&x);
            let start = random(n_max * n_y, 3);
            let expected = product.reference(&w, x);
            for isa in isas() {
                let cpu = Cpu::with_isa(2, isa);
                for start in [None, Some(&start[..])] {
                    let what = format!(
                        "{product:?} {isa} {n_rows}x{n_cols} of {} bytes, accumulate {}",
                        w.data.element_bytes(),
                        start.is_some()
                    );
                    let all = product.run(&cpu, &w, n_max, x, start);
                    for (i, (y, expected)) in all.iter().zip(&expected).enumerate() {
                        let expected = expected + start.map_or(0.0, |start| start[i]);
                        assert!((y - expected).abs() <= tolerance(n_x), "{what}: y[{i}] {y}, {expected}");
                    }
                    for &n in n_tokens {
                        let some = product.run(&cpu, &w, n, x, start);
                        assert!(
                            bits(&some) == bits(&all[..n * n_y]),
                            "{what}: {n} tokens differ from {n_max}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn small_shapes_of_every_batch_size() {
    let n_tokens: Vec<usize> = (0..70).collect();
    check(&[(1, 1), (1, 300), (7, 15), (24, 16), (25, 33), (41, 70)], 70, &n_tokens);
}

#[test]
fn shapes_of_several_blocks() {
    check(&[(256, 256), (257, 255), (130, 600), (600, 130), (49, 1025)], 40, &[1, 5, 16, 33]);
}

#[test]
fn chunks_of_every_size() {
    // Rows and columns for the largest chunks of both products, and one more; tokens for more than one chunk.
    check(&[(1601, 3), (3, 4225)], 7, &[1, 6]);
    check(&[(31, 90)], 530, &[64, 256, 257, 300, 512, 529]);
}

#[test]
fn threads_do_not_change_a_bit() {
    for (n_rows, n_cols, n_tokens) in [(1, 1, 1), (130, 290, 3), (801, 70, 37), (70, 2100, 37), (40, 50, 300)]
    {
        let weights = Weights::new(n_rows, n_cols);
        let [_, w, _] = weights.matrices();
        for (product, isa) in Product::ALL.into_iter().flat_map(|p| isas().map(move |isa| (p, isa))) {
            let x = product.x(&w, n_tokens);
            let one = product.run(&Cpu::with_isa(1, isa), &w, n_tokens, inner(&x), None);
            for n_threads in [2, 3, 5] {
                let many = product.run(&Cpu::with_isa(n_threads, isa), &w, n_tokens, inner(&x), None);
                assert!(
                    bits(&one) == bits(&many),
                    "{product:?} {isa} {n_rows}x{n_cols} on {n_threads} threads"
                );
            }
        }
    }
}

#[test]
fn instruction_sets_with_fma_agree_bit_for_bit() {
    let weights = Weights::new(77, 530);
    for w in weights.matrices() {
        for product in Product::ALL {
            let x = product.x(&w, 37);
            let results: Vec<_> = isas()
                .filter(|&isa| isa > Isa::Portable)
                .map(|isa| bits(&product.run(&Cpu::with_isa(2, isa), &w, 37, inner(&x), None)))
                .collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{product:?}");
        }
    }
}

#[test]
fn a_product_leaves_nothing_behind_for_the_next() {
    let weights = Weights::new(50, 300);
    let [_, w, _] = weights.matrices();
    for (product, isa) in Product::ALL.into_iter().flat_map(|p| isas().map(move |isa| (p, isa))) {
        let cpu = Cpu::with_isa(2, isa);
        let x = product.x(&w, 35);
        let expected = product.run(&cpu, &w, 9, inner(&x), None);
        let nan = vec![f32::NAN; 35 * product.widths(&w).0];
        assert!(
            product.run(&cpu, &w, 35, &nan, None).iter().all(|v| v.is_nan()),
            "{product:?} {isa} hides NaN"
        );
        assert_eq!(bits(&product.run(&cpu, &w, 9, inner(&x), None)), bits(&expected), "{product:?} {isa}");
    }
}

#[test]
fn an_empty_sum_is_zero() {
    let none = Elements::F32(&[]);
    let cpu = Cpu::new(1);
    let mut y = [f32::NAN; 6];
    cpu.matmul(&Matrix::new(none, 3, 0).unwrap(), 2, &[], &mut y, false).unwrap();
    assert_eq!(y, [0.0; 6]);
    let mut y = [f32::NAN; 6];
    cpu.matmul_t(&Matrix::new(none, 0, 3).unwrap(), 2, &[], &mut y, false).unwrap();
    assert_eq!(y, [0.0; 6]);
    let mut y = [1.0; 6];
    cpu.matmul(&Matrix::new(none, 3, 0).unwrap(), 2, &[], &mut y, true).unwrap();
    cpu.matmul_t(&Matrix::new(none, 0, 3).unwrap(), 2, &[], &mut y, true).unwrap();
    assert_eq!(y, [1.0; 6]);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let weights = Weights::new(4, 6);
    let [w, ..] = weights.matrices();
    let cpu = Cpu::new(1);
    let mut y = [0.0; 12];
    assert_eq!(cpu.matmul(&w, 3, &[0.0; 17], &mut y, false).unwrap_err().expected, 18);
    assert_eq!(cpu.matmul(&w, 2, &[0.0; 12], &mut y, false).unwrap_err().expected, 8);
    assert_eq!(cpu.matmul_t(&w, 3, &[0.0; 11], &mut y, false).unwrap_err().expected, 12);
    assert_eq!(cpu.matmul_t(&w, 3, &[0.0; 12], &mut y, false).unwrap_err().expected, 18);
}
