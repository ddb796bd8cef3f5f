//! How the cost of a change that affects two nodes grows with the number of nodes: the exponent `e` in `cost ~ n^e`.

use super::shape::Kind;
use crate::bench::report::{Report, Row, Target};
use crate::bench::statistics::median;

/// A change that affects two nodes costs the same however many there are.
const EXPONENT: f64 = 0.1;

/// What was measured, by the number of nodes.
#[derive(Debug, Default)]
pub(super) struct Growth {
    calls: Vec<(f64, f64)>,
    cpu: Vec<(f64, f64)>,
    enforced: Vec<(f64, f64)>,
}

impl Growth {
    pub(super) fn add(&mut self, nodes: f64, calls: &[f64], cpu: f64, enforced: &[f64]) {
        self.calls.push((nodes, median(calls)));
        self.cpu.push((nodes, cpu));
        self.enforced.push((nodes, median(enforced)));
    }

    pub(super) fn report(&self, kind: Kind, report: &mut Report) {
        let kind = if kind == Kind::Groups { "groups" } else { "mesh" };
        let figures =
            [("commit call", &self.calls), ("controller CPU", &self.cpu), ("call to enforced", &self.enforced)];
        for (what, points) in figures {
            let name = format!("{kind}, change of 2 nodes: growth of the {what} with n, exponent");
            let row = match exponent(points) {
                Some(exponent) => Row::new(name, exponent, ""),
                None => Row::missing(name, "fewer than two sizes were measured", ""),
            };
            report.push(row.target(Target::AtMost(EXPONENT)));
        }
    }
}

/// The slope of the straight line through the logarithms that has the least squares.
pub(super) fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<(f64, f64)> =
        points.iter().filter(|(n, cost)| *n > 0.0 && *cost > 0.0).map(|(n, cost)| (n.ln(), cost.ln())).collect();
    let count = logs.len() as f64;
    let (x, y) = (logs.iter().map(|(x, _)| x).sum::<f64>() / count, logs.iter().map(|(_, y)| y).sum::<f64>() / count);
    let spread: f64 = logs.iter().map(|(a, _)| (a - x).powi(2)).sum();
    (spread > 0.0).then(|| logs.iter().map(|(a, b)| (a - x) * (b - y)).sum::<f64>() / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponent_is_that_of_the_power() {
        let of = |power: f64| exponent(&[100.0, 1_000.0, 10_000.0].map(|n: f64| (n, 3.0 * n.powf(power))));
        for power in [0.0, 0.5, 1.0, 1.9] {
            assert!(of(power).is_some_and(|found| (found - power).abs() < 1e-9), "{power}");
        }
        assert_eq!((exponent(&[]), exponent(&[(100.0, 1.0)])), (None, None));
    }
}
