//! What repeated measurements say.

/// The smallest; NaN of none.
pub fn minimum(values: &[f64]) -> f64 {
    quantile(values, 0.0)
}

/// The middle; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which the `share` of them lies, between neighbours in proportion; NaN of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(last), place) = (sorted.len().checked_sub(1), share.clamp(0.0, 1.0)) else { return f64::NAN };
    let place = place * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

/// The middle of paired values, and the interval that holds it in 95 of 100 repetitions of the whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub middle: f64,
    pub low: f64,
    pub high: f64,
}

/// The median of `a / b` over the pairs.
pub fn ratio(pairs: &[(f64, f64)]) -> Estimate {
    estimate(&pairs.iter().map(|(a, b)| a / b).collect::<Vec<_>>())
}

/// The median of `a - b` over the pairs.
pub fn difference(pairs: &[(f64, f64)]) -> Estimate {
    estimate(&pairs.iter().map(|(a, b)| a - b).collect::<Vec<_>>())
}

/// Samples drawn again from the sample: enough for the ends of the interval to be steady in three digits.
const RESAMPLES: usize = 2_000;

/// The median, with the percentile interval of its bootstrap. A median, since a neighbour on the machine disturbs single
/// pairs by much. The same values give the same interval.
pub fn estimate(values: &[f64]) -> Estimate {
    let mut draw = Draw::new(0x9e37_79b9_7f4a_7c15);
    let mut medians = Vec::with_capacity(RESAMPLES);
    let mut sample = vec![0.0; values.len()];
    for _ in 0..RESAMPLES {
        for slot in &mut sample {
            *slot = values[draw.below(values.len())];
        }
        medians.push(median(&sample));
    }
    Estimate { middle: median(values), low: quantile(&medians, 0.025), high: quantile(&medians, 0.975) }
}

/// Numbers that look random and are the same each time (xorshift).
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Less than `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.word() % end as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!((minimum(&values), median(&values), quantile(&values, 1.0)), (1.0, 2.5, 4.0));
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_ratio_is_taken_pair_by_pair() {
        // Whatever slows both halves of a pair does not show.
        let pairs: Vec<(f64, f64)> = (1..=30).map(|load| (90.0 * f64::from(load), 100.0 * f64::from(load))).collect();
        let ratio = ratio(&pairs);
        assert!((ratio.middle - 0.9).abs() < 1e-9 && (ratio.high - ratio.low).abs() < 1e-9, "{ratio:?}");
    }

    #[test]
    fn the_interval_holds_the_truth_about_as_often_as_it_says() {
        let mut draw = Draw::new(7);
        let mut uniform = || draw.below(1_000_000) as f64 / 1e6;
        let held = (0..200).filter(|_| {
            let values: Vec<f64> = (0..30).map(|_| uniform()).collect();
            let estimate = estimate(&values);
            estimate.low <= 0.5 && 0.5 <= estimate.high
        });
        let held = held.count();
        assert!((180..=199).contains(&held), "{held} of 200");
    }

    #[test]
    fn one_disturbed_pair_does_not_move_the_middle() {
        let mut pairs = vec![(99.0, 100.0); 29];
        pairs.push((1.0, 100.0));
        assert_eq!(ratio(&pairs).middle, 0.99);
    }
}
