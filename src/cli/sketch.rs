//! A curve in a line: its shape, where it began and ended, and its extremes.

/// Columns that a shape takes at most.
const WIDTH: usize = 32;

/// From low to high.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A curve in words, with its shape where it has one; `None` for one without points.
pub(super) fn sketch(curve: &[(u64, f64)]) -> Option<String> {
    let (&(first_at, first), &(last_at, last)) = (curve.first()?, curve.last()?);
    if curve.len() == 1 {
        return Some(format!("{} at step {first_at}", short(first)));
    }
    let values = || curve.iter().map(|(_, value)| *value);
    let (low, high) = (values().fold(first, f64::min), values().fold(first, f64::max));
    let columns = curve.len().min(WIDTH);
    let shape = (0..columns).map(|column| {
        let points = &curve[column * curve.len() / columns..(column + 1) * curve.len() / columns];
        let mean = points.iter().map(|(_, value)| value).sum::<f64>() / points.len() as f64;
        let height = if high > low { (mean - low) / (high - low) } else { 0.0 };
        BARS[((height * BARS.len() as f64) as usize).min(BARS.len() - 1)]
    });
    let shape: String = shape.collect();
    let (n, low, high) = (curve.len(), short(low), short(high));
    let ends = format!("{} at step {first_at}, {} at step {last_at}", short(first), short(last));
    Some(format!("{shape}  {n} points, {ends}, from {low} to {high}"))
}

/// A number in about four digits.
fn short(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e5).contains(&size) {
        return format!("{value:.3e}");
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_a_line() {
        assert_eq!(sketch(&[]), None);
        assert_eq!(sketch(&[(20, 0.885)]).unwrap(), "0.885 at step 20");
        let falling: Vec<(u64, f64)> = (0..4).map(|i| (10 * i, 4.0 - i as f64)).collect();
        let said = sketch(&falling).unwrap();
        assert_eq!(said, "█▆▃▁  4 points, 4 at step 0, 1 at step 30, from 1 to 4");
        let long: Vec<(u64, f64)> = (0..1000).map(|i| (i, (i as f64).sin())).collect();
        assert_eq!(sketch(&long).unwrap().chars().take_while(|c| BARS.contains(c)).count(), WIDTH);
        let flat = sketch(&[(1, 2e-5), (2, 2e-5)]).unwrap();
        assert!(flat.starts_with("▁▁  2 points, 2.000e-5 at step 1"), "{flat}");
    }
}
