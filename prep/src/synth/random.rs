//! Random weights, fast and the same for any number of threads.
//!
//! Every matrix row has a stream of its own, keyed by seed, tensor and row, so that rows can be made in any order.
//! Normal deviates come from a table of quantiles: 4096 levels reach 3.7 standard deviations, which is plenty for
//! weights that stand in for trained ones, and cost one load each.

use half::{bf16, f16};
use kernels::Elements;

/// Levels of a normal deviate.
const N_LEVELS: usize = 4096;
/// Levels of a gate weight's magnitude.
const N_MAGNITUDES: usize = 2048;

/// SplitMix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    state: u64,
}

impl Stream {
    const INCREMENT: u64 = 0x9E37_79B9_7F4A_7C15;

    /// The stream of one row of one tensor.
    pub(super) fn new(seed: u64, tensor: u64, row: u64) -> Self {
        let key = mix(mix(seed ^ 0x5359_4E54_4848_4F4E).wrapping_add(tensor));
        Self { state: mix(key.wrapping_add(row.wrapping_mul(Self::INCREMENT))) }
    }

    /// 64 uniform bits.
    pub(super) fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(Self::INCREMENT);
        mix(self.state)
    }

    /// Uniform in `0..bound`, with a bias below `bound / 2^32`.
    pub(super) fn next_below(&mut self, bound: u32) -> u32 {
        (((self.next_u64() >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// Uniform in `[0, 1)`.
    pub(super) fn next_unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The finaliser of SplitMix64, a bijection that spreads every input bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// An element type that weights are written in.
pub(super) trait Element: bytemuck::Pod + Send + Sync {
    /// Its name in a safetensors header.
    const SAFETENSORS: &'static str;
    /// Its name in config.json.
    const TORCH: &'static str;
    /// Nearest value.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
    /// The value with its sign flipped where `flip` is true.
    fn flip_if(self, flip: bool) -> Self;
    /// The slice as kernels take it.
    fn elements(data: &[Self]) -> Elements<'_>;
}

impl Element for f32 {
    const SAFETENSORS: &'static str = "F32";
    const TORCH: &'static str = "float32";
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn flip_if(self, flip: bool) -> Self {
        Self::from_bits(self.to_bits() ^ (u32::from(flip) << 31))
    }
    fn elements(data: &[Self]) -> Elements<'_> {
        Elements::F32(data)
    }
}

impl Element for f16 {
    const SAFETENSORS: &'static str = "F16";
    const TORCH: &'static str = "float16";
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn flip_if(self, flip: bool) -> Self {
        Self::from_bits(self.to_bits() ^ (u16::from(flip) << 15))
    }
    fn elements(data: &[Self]) -> Elements<'_> {
        Elements::F16(data)
    }
}

impl Element for bf16 {
    const SAFETENSORS: &'static str = "BF16";
    const TORCH: &'static str = "bfloat16";
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn flip_if(self, flip: bool) -> Self {
        Self::from_bits(self.to_bits() ^ (u16::from(flip) << 15))
    }
    fn elements(data: &[Self]) -> Elements<'_> {
        Elements::Bf16(data)
    }
}

/// Quantiles of the standard normal distribution, scaled to unit variance.
#[derive(Clone, Debug)]
pub(super) struct Quantiles(Vec<f32>);

impl Quantiles {
    pub(super) fn new() -> Self {
        let mut levels: Vec<f64> =
            (0..N_LEVELS).map(|i| normal_quantile((i as f64 + 0.5) / N_LEVELS as f64)).collect();
        let rms = (levels.iter().map(|v| v * v).sum::<f64>() / N_LEVELS as f64).sqrt();
        levels.iter_mut().for_each(|v| *v /= rms);
        Self(levels.into_iter().map(|v| v as f32).collect())
    }

    /// A normal deviate of unit variance.
    pub(super) fn draw(&self, stream: &mut Stream) -> f32 {
        self.0[stream.next_u64() as usize % N_LEVELS]
    }

    /// The table for weights of standard deviation `sigma` in the type they are stored in.
    pub(super) fn scaled<T: Element>(&self, sigma: f32) -> NormalTable<T> {
        NormalTable(self.0.iter().map(|&v| T::from_f32(v * sigma)).collect())
    }
}

/// Normal weights, one lookup each.
#[derive(Clone, Debug)]
pub(super) struct NormalTable<T>(Vec<T>);

impl<T: Element> NormalTable<T> {
    /// Fills `out` with normal weights, four from each 64 bits.
    pub(super) fn fill(&self, mut stream: Stream, out: &mut [T]) {
        let table: &[T; N_LEVELS] = self.0[..].try_into().expect("the table has N_LEVELS entries");
        for out in out.chunks_mut(4) {
            let mut bits = stream.next_u64();
            for out in out {
                *out = table[bits as usize % N_LEVELS];
                bits >>= 16;
            }
        }
    }
}

/// Gate weights: magnitudes uniform in `[0.5, 1.5] * sigma`, a sign that agrees with the mean input's with a
/// probability of the row's, and a shift against the mean input.
#[derive(Clone, Debug)]
pub(super) struct GateTable<T>(Vec<T>);

impl<T: Element> GateTable<T> {
    /// The first half holds the weights that disagree with the mean's sign, the second those that agree, both for a
    /// column whose mean is positive.
    pub(super) fn new(sigma: f32, shift: f32) -> Self {
        let magnitude = |i: usize| sigma * (0.5 + (i as f32 + 0.5) / N_MAGNITUDES as f32);
        let disagree = (0..N_MAGNITUDES).map(|i| T::from_f32(-magnitude(i) - shift));
        let agree = (0..N_MAGNITUDES).map(|i| T::from_f32(magnitude(i) - shift));
        Self(disagree.chain(agree).collect())
    }

    /// One row. `p_agree`: probability that a weight has the sign of its column's mean; `mean_negative (n_cols,)`.
    pub(super) fn fill(&self, mut stream: Stream, p_agree: f64, mean_negative: &[bool], out: &mut [T]) {
        let table: &[T; 2 * N_MAGNITUDES] = self.0[..].try_into().expect("the table has two halves");
        let n_agree = (p_agree.clamp(0.0, 1.0) * 65536.0).round() as usize;
        for (out, mean_negative) in out.chunks_mut(2).zip(mean_negative.chunks(2)) {
            let mut bits = stream.next_u64();
            for (out, &mean_negative) in out.iter_mut().zip(mean_negative) {
                let agrees = (bits >> 16) as usize % 65536 < n_agree;
                let idx = bits as usize % N_MAGNITUDES + usize::from(agrees) * N_MAGNITUDES;
                *out = table[idx].flip_if(mean_negative);
                bits >>= 32;
            }
        }
    }
}

/// The inverse of the standard normal distribution function for `0 < p < 1`, good to about 1e-9.
/// Source: P. J. Acklam's rational approximation.
pub(super) fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 5] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 4] =
        [7.784_695_709_041_462e-3, 3.224_671_290_700_398e-1, 2.445_134_137_142_996, 3.754_408_661_907_416];
    let horner = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p < 0.024_25 {
        let q = (-2.0 * p.ln()).sqrt();
        horner(&C, q) / (horner(&D, q) * q + 1.0)
    } else if p > 1.0 - 0.024_25 {
        -normal_quantile(1.0 - p)
    } else {
        let q = p - 0.5;
        let r = q * q;
        horner(&A, r) * q / (horner(&B, r) * r + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_match_known_values() {
        for (p, x) in [(0.5, 0.0), (0.89, 1.226_528_12), (0.975, 1.959_963_985), (0.001, -3.090_232_306)] {
            assert!((normal_quantile(p) - x).abs() < 1e-6, "p {p}: {} and {x}", normal_quantile(p));
        }
    }

    #[test]
    fn normal_weights_have_the_asked_moments() {
        let table = Quantiles::new().scaled::<f32>(0.25);
        let mut weights = vec![0.0; 100_003];
        table.fill(Stream::new(1, 2, 3), &mut weights);
        let n = weights.len() as f64;
        let mean = weights.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = weights.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n - mean * mean;
        assert!(mean.abs() < 0.004, "mean {mean}");
        assert!((variance.sqrt() - 0.25).abs() < 0.003, "deviation {}", variance.sqrt());
        let beyond = weights.iter().filter(|v| v.abs() > 0.5).count() as f64 / n;
        assert!((beyond - 0.0455).abs() < 0.003, "share beyond two deviations {beyond}");
    }

    #[test]
    fn streams_of_neighbouring_rows_and_tensors_differ() {
        let draws: Vec<u64> = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)]
            .map(|(seed, tensor, row)| Stream::new(seed, tensor, row).next_u64())
            .into();
        for (i, a) in draws.iter().enumerate() {
            assert!(draws[i + 1..].iter().all(|b| (a ^ b).count_ones() > 10), "{draws:x?}");
        }
    }

    #[test]
    fn gate_weights_agree_with_the_mean_as_often_as_asked() {
        let mean_negative: Vec<bool> = (0..50_001).map(|i| i % 3 == 0).collect();
        let mut weights = vec![f16::ZERO; mean_negative.len()];
        GateTable::new(0.02, 0.001).fill(Stream::new(7, 8, 9), 0.3, &mean_negative, &mut weights);
        let agree = weights
            .iter()
            .zip(&mean_negative)
            .filter(|(w, negative)| (w.to_f32() < 0.0) == **negative)
            .count();
        let share = agree as f64 / weights.len() as f64;
        assert!((share - 0.3).abs() < 0.01, "share {share}");
        // Magnitudes lie in [0.5, 1.5] * sigma, moved by the shift away from the mean's sign.
        for (w, &negative) in weights.iter().zip(&mean_negative) {
            let along_mean = if negative { -w.to_f32() } else { w.to_f32() } + 0.001;
            assert!((0.00999..=0.03001).contains(&along_mean.abs()), "{w}");
        }
    }
}
