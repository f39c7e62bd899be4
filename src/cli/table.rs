//! Plain tables: columns as wide as their content, numbers to the right.

/// Renders rows under a heading; an empty list gives an empty string.
pub(super) fn render(heading: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head: Vec<String> = heading.iter().map(|h| (*h).to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |c: usize| {
        all.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let numeric: Vec<bool> =
        (0..heading.len()).map(|c| rows.iter().all(|r| is_number(&r[c]))).collect();
    let mut out = String::new();
    for row in all {
        let mut line = String::new();
        for (c, text) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c] - text.chars().count());
            let cell = if numeric[c] { format!("{pad}{text}") } else { format!("{text}{pad}") };
            line.push_str(&cell);
            line.push_str("  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn is_number(text: &str) -> bool {
    text.is_empty() || text.chars().next().is_some_and(|c| c.is_ascii_digit() || "-+~".contains(c))
}

/// Seconds for people: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`.
pub(super) fn seconds(s: f64) -> String {
    let whole = s.round() as u64;
    match whole {
        0..10 => format!("{s:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Bytes for people, in powers of ten: `3.0 MB`.
pub(super) fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut x = n as f64;
    let mut unit = 0;
    while x >= 1000.0 && unit + 1 < units.len() {
        x /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{x:.1} {}", units[unit]) }
}

/// A time in Unix milliseconds for people.
pub(super) fn when(unix_ms: u64) -> String {
    let time =
        i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(String::new, |t| t.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "10".into()], vec!["bcd".into(), "7".into()]];
        assert_eq!(render(&["x", "n"], &rows), "x     n\na    10\nbcd   7\n");
    }

    #[test]
    fn amounts_for_people() {
        assert_eq!(seconds(0.42), "0.4 s");
        assert_eq!(seconds(185.0), "3 min 5 s");
        assert_eq!(bytes(2_960_000), "3.0 MB");
        assert_eq!(bytes(12), "12 B");
    }
}
