//! Numbers with a unit, as people write them.

use std::time::Duration;

/// A number with a unit; the number may have a fraction.
fn quantity(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit);
    Some((number.parse().ok()?, unit.trim()))
}

/// A length of time: `90s`, `15m`, `2h`, `1d`, `500ms`.
pub fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = quantity(text)?;
    let seconds = match unit {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * seconds).ok()
}

/// A number of bytes: `8GiB`, `512MB`, `1024B`.
pub fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = quantity(text)?;
    let scale = match unit {
        "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        "TiB" => 1_099_511_627_776.0,
        _ => return None,
    };
    let size = number * scale;
    // Exact far beyond any memory there is.
    (size < 9e15).then_some(size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(duration("90s"), Some(Duration::from_secs(90)));
        assert_eq!(duration("1.5h"), Some(Duration::from_secs(5400)));
        assert_eq!(duration("0s"), Some(Duration::ZERO));
        assert_eq!(duration("90"), None);
        assert_eq!(bytes("8GiB"), Some(8 << 30));
        assert_eq!(bytes("1.5MB"), Some(1_500_000));
        assert_eq!(bytes("8 parsecs"), None);
    }
}
