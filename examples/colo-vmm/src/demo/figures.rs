//! Mean and percentiles.

use serde::{Deserialize, Serialize};

/// How a figure spreads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile: the smallest value that 99 % of the values do not exceed.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// The spread of some values; `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        Some(Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(&values, 50)?,
            p99: percentile(&values, 99)?,
            max,
        })
    }

    /// The spread of some counts.
    pub fn of_counts(values: impl IntoIterator<Item = u64>) -> Option<Self> {
        Self::of(values.into_iter().map(|value| value as f64))
    }
}

/// Nearest rank.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let spread = Spread::of((1..=200).rev().map(f64::from)).unwrap();
        assert_eq!(
            spread,
            Spread {
                mean: 100.5,
                p50: 100.0,
                p99: 198.0,
                max: 200.0
            }
        );
        let one = Spread::of([3.0]).unwrap();
        assert_eq!((one.mean, one.p50, one.p99, one.max), (3.0, 3.0, 3.0, 3.0));
        let ten = Spread::of((1..=10).map(f64::from)).unwrap();
        assert_eq!((ten.p50, ten.p99), (5.0, 10.0));
        assert_eq!(Spread::of([]), None);
    }
}
