//! How a token is drawn from logits, defined in integers, so that every backend draws the same one.
//!
//! ```text
//! distance(i) = (max(logits) - logits[i]) in units of 2^-27; candidates are those below 2^32
//! weight(q)   = exp(-q / temp) in units of 2^-40
//! order       = by distance, equals by the lower id
//! top_k       keeps the first top_k candidates
//! top_p       keeps the fewest of these whose weights at temp 1 reach top_p of their sum
//! min_p       keeps those with distance at most -ln(min_p)
//! draw        the first one at which the running sum of weights passes random / 2^64 of the whole sum
//! ```
//!
//! Sums of integers do not depend on their order. Differences and products in between are of f32, each rounded once and
//! none fused, which processors and GPUs do alike. A candidate at 32 below the best has `e^-32` of its weight, less than
//! 2^-40, so that nothing is lost at temperatures up to 1.

/// Units of a distance in a difference of one between logits.
const DISTANCE_UNITS: f32 = (1 << 27) as f32;
/// Distances that are none.
const DISTANCES: f32 = 4_294_967_296.0;
/// Binary digits of weights behind the point: the best candidate weighs `2^WEIGHT_BITS`.
const WEIGHT_BITS: u32 = 40;
/// `(-ln 2)^k / k!`: Taylor's series of `2^-x`, off by 1e-8 at most up to `x = 1`.
const EXP2_TERMS: [f32; 10] = [
    1.0,
    -std::f32::consts::LN_2,
    0.240_226_5,
    -0.055_504_11,
    0.009_618_129,
    -0.001_333_355_8,
    0.000_154_035_3,
    -0.000_015_252_734,
    0.000_001_321_548_6,
    -0.000_000_101_780_86,
];

/// What is kept and how it is weighed, as integers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Takes the largest logit, of equals the one with the lowest id, without a draw.
    pub greedy: bool,
    /// Candidates kept; 0 keeps all.
    pub top_k: u32,
    /// Share of the sum of weights, in units of 2^-32; `2^32` keeps all.
    pub top_p: u64,
    /// Largest distance kept.
    pub distance_max: u32,
    /// Halvings of the weight in a unit of distance, at the temperature of the draw.
    pub scale: f32,
}

impl Draw {
    /// The usual options: `temp` 0 takes the best, `top_k` 0, `top_p` 1 and `min_p` 0 keep all.
    pub fn new(temp: f64, top_k: usize, top_p: f64, min_p: f64) -> Self {
        Self {
            greedy: temp == 0.0,
            top_k: u32::try_from(top_k).unwrap_or(0),
            // Casts saturate: shares and distances outside of what is sensible keep nothing or all.
            top_p: ((top_p * 2.0_f64.powi(32)).round() as u64).min(1 << 32),
            distance_max: ((-min_p.ln() * f64::from(DISTANCE_UNITS)) as u32).min(u32::MAX - 1),
            scale: scale_at(temp),
        }
    }
}

/// Halvings of a weight in a unit of distance; finite for every temperature.
fn scale_at(temp: f64) -> f32 {
    ((std::f64::consts::LOG2_E / f64::from(DISTANCE_UNITS) / temp) as f32).min(f32::MAX)
}

/// Halvings of a weight in a unit of distance at temperature 1, for the weights of top_p.
pub const SCALE_ONE: f32 = std::f32::consts::LOG2_E / DISTANCE_UNITS;

/// How far `logit` is from `best`, the largest; `None` where that is too far, as it always is for minus infinity.
pub fn distance(best: f32, logit: f32) -> Option<u32> {
    let units = (best - logit) * DISTANCE_UNITS;
    (units < DISTANCES).then_some(units as u32)
}

/// Weight of a candidate.
pub fn weight(distance: u32, scale: f32) -> u64 {
    let halvings = distance as f32 * scale;
    if halvings >= (WEIGHT_BITS + 1) as f32 {
        return 0;
    }
    let whole = halvings.floor();
    let part = halvings - whole;
    let power = EXP2_TERMS.iter().rev().fold(0.0, |sum, term| sum * part + term);
    ((power * (1_u64 << WEIGHT_BITS) as f32) as u64) >> whole as u32
}

/// The sum that the candidates kept by `top_p` have to reach, of the sum `total` of all.
pub fn top_p_need(total: u64, top_p: u64) -> u64 {
    (((u128::from(total) * u128::from(top_p)) >> 32) as u64).max(1)
}

/// The running sum at which a draw stops, from 1 to `total`.
pub fn draw_need(total: u64, random: u64) -> u64 {
    ((u128::from(total) * u128::from(random)) >> 64) as u64 + 1
}

/// The random number for the token at `position` of a text with `seed`: 64 bits of Philox4x32-10, a counter-based
/// generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
pub fn random(seed: u64, position: u32) -> u64 {
    let [a, b, ..] = philox([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(a) | u64::from(b) << 32
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let multiply = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let (high_0, low_0) = multiply(0xd251_1f53, counter[0]);
        let (high_1, low_1) = multiply(0xcd9e_8d57, counter[2]);
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

/// The token for `logits` (neither NaN nor plus infinity); `None` if all are minus infinity. The definition above,
/// word for word, by sorting everything.
pub fn reference(logits: &[f32], draw: &Draw, random: u64) -> Option<u32> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut candidates: Vec<(u32, u32)> =
        logits.iter().zip(0..).filter_map(|(&logit, id)| Some((distance(best, logit)?, id))).collect();
    if draw.greedy {
        // Exactly the largest: distances tell apart no logits closer than 2^-27.
        return candidates.iter().map(|&(_, id)| id).find(|&id| logits[id as usize] == best);
    }
    candidates.sort_unstable();
    if draw.top_k > 0 {
        candidates.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1 << 32 {
        let total = candidates.iter().map(|&(q, _)| weight(q, SCALE_ONE)).sum();
        let last = reach(&candidates, SCALE_ONE, top_p_need(total, draw.top_p));
        candidates.truncate(last.map_or(0, |last| last + 1));
    }
    candidates.retain(|&(q, _)| q <= draw.distance_max);
    let total = candidates.iter().map(|&(q, _)| weight(q, draw.scale)).sum();
    reach(&candidates, draw.scale, draw_need(total, random)).map(|chosen| candidates[chosen].1)
}

/// The candidate at which the running sum of weights reaches `need`.
fn reach(candidates: &[(u32, u32)], scale: f32, need: u64) -> Option<usize> {
    let mut running = 0;
    candidates.iter().position(|&(q, _)| {
        running += weight(q, scale);
        running >= need
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 library.
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox(counter, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn weights_are_powers_of_e() {
        assert_eq!(weight(0, SCALE_ONE), 1 << 40);
        for i in 0..3000 {
            let logit = -0.009 * i as f32;
            let q = distance(0.0, logit).expect("near");
            for temp in [0.1, 1.0, 3.0] {
                let want = (f64::from(logit) / temp).exp() * 2.0_f64.powi(40);
                let found = weight(q, scale_at(temp)) as f64;
                assert!((found - want).abs() <= 1.0 + 4e-6 * want, "{logit} at {temp}: {found}, not {want}");
            }
        }
        assert_eq!(weight(u32::MAX, SCALE_ONE), 0);
        assert_eq!(weight(0, scale_at(1e-300)), 1 << 40);
        assert_eq!(weight(1, scale_at(1e-300)), 0);
    }

    #[test]
    fn distances_end_at_32() {
        assert_eq!(distance(7.5, 7.5), Some(0));
        assert_eq!(distance(7.5, 6.5), Some(1 << 27));
        assert_eq!(distance(0.0, -31.999_998), Some(u32::MAX - 255));
        assert_eq!(distance(0.0, -32.0), None);
        assert_eq!(distance(0.0, f32::NEG_INFINITY), None);
        assert_eq!(distance(f32::NEG_INFINITY, f32::NEG_INFINITY), None);
        assert_eq!(distance(f32::MAX, f32::MIN), None);
    }

    #[test]
    fn options_become_integers() {
        let all = Draw::new(1.0, 0, 1.0, 0.0);
        assert_eq!((all.top_k, all.top_p, all.distance_max), (0, 1 << 32, u32::MAX - 1));
        assert_eq!(all.scale, SCALE_ONE);
        let one = Draw::new(0.5, usize::MAX, 0.0, 1.0);
        assert_eq!((one.top_k, one.top_p, one.distance_max, one.greedy), (0, 0, 0, false));
        assert!(Draw::new(0.0, 0, 1.0, 0.0).greedy);
    }
}
