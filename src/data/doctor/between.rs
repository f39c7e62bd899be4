//! Splits held against each other.

use std::collections::{BTreeMap, BTreeSet};

use super::survey::Survey;
use super::{About, Check, Doctor, Finding, SHOWN, percent};
use crate::data::minhash::Alike;

/// Standard errors by which two samples of one distribution may differ.
const CHANCE: f64 = 3.0;

/// Every split against those before it; classes and lengths against the first alone.
pub(super) fn compare(doctor: &Doctor, splits: &[(&str, &Survey)], found: &mut Vec<Finding>) {
    for (at, (name, survey)) in splits.iter().enumerate() {
        for (other, earlier) in &splits[..at] {
            let of = survey.rows();
            let mut add = |check, count, rows, message| {
                let about = About { count, of, rows };
                let mut finding = doctor.finding(check, name, about, message);
                finding.against = Some((*other).to_owned());
                found.push(finding);
            };
            let shared = shared(survey, earlier);
            if !shared.is_empty() {
                let count = shared.len() as u64;
                let message = format!("{count} of {of} rows of `{name}` also stand in `{other}`");
                add(Check::Overlap, count, shared.into_iter().take(SHOWN).collect(), message);
            }
            let near = near(doctor, survey, earlier);
            if let Some((row, like)) = near.first() {
                let count = near.len() as u64;
                let message = format!(
                    "{count} of {of} rows of `{name}` nearly stand in `{other}`, as row {row} \
                     does in row {like}"
                );
                let rows = near.iter().map(|(row, _)| *row).take(SHOWN).collect();
                add(Check::NearOverlap, count, rows, message);
            }
        }
        if let (Some((first, base)), true) = (splits.first(), at > 0) {
            drift(doctor, (name, survey), (first, base), found);
        }
    }
}

/// Rows of a split whose text is one of another's.
pub(super) fn shared(survey: &Survey, other: &Survey) -> Vec<u64> {
    let mut known = other.contents().to_vec();
    known.sort_unstable();
    let rows = survey.contents().iter().enumerate();
    let rows = rows.filter(|(_, content)| known.binary_search(content).is_ok());
    rows.map(|(row, _)| row as u64).collect()
}

/// (row, the first of another split that is nearly the same), by row; those that stand there as
/// they are do not count.
pub(super) fn near(doctor: &Doctor, survey: &Survey, other: &Survey) -> Vec<(u64, u64)> {
    let Some(near) = doctor.limits.near else { return Vec::new() };
    let same: BTreeSet<u64> = shared(survey, other).into_iter().collect();
    // Of two splits the later one is the smaller, most often: it is kept, the other passes by.
    let (mut alike, mut rows) = (Alike::new(near.threshold), Vec::new());
    for (row, signature) in (0..).zip(survey.signatures()) {
        if !same.contains(&row) {
            alike.add(*signature);
            rows.push(row);
        }
    }
    let mut found = Vec::new();
    for (like, signature) in (0..).zip(other.signatures()) {
        let numbers = alike.take_like(signature).into_iter();
        found.extend(numbers.map(|number| (rows[number as usize], like)));
    }
    found.sort_unstable();
    found
}

fn drift(
    doctor: &Doctor,
    (name, survey): (&str, &Survey),
    (first, base): (&str, &Survey),
    found: &mut Vec<Finding>,
) {
    let of = survey.rows();
    let mut add = |check, count, message| {
        let mut finding =
            doctor.finding(check, name, About { count, of, rows: Vec::new() }, message);
        finding.against = Some(first.to_owned());
        found.push(finding);
    };
    if base.is_labelled() {
        for (class, count) in survey.classes() {
            if !base.classes().contains_key(class) {
                let class = doctor.name_of(*class);
                let message = format!(
                    "{count} of {of} rows of `{name}` are of class `{class}`, which `{first}` \
                     never shows"
                );
                add(Check::UnseenClass, *count, message);
            }
        }
    }
    let limit = doctor.limits.drift;
    if let Some((distance, class)) = class_distance(survey, base)
        && distance > limit.max(chance(survey.rows(), base.rows()))
    {
        let rows = |survey: &Survey| survey.classes().get(&class).copied().unwrap_or(0);
        let here = percent(rows(survey), survey.rows());
        let there = percent(rows(base), base.rows());
        let class = doctor.name_of(class);
        let message = format!(
            "classes of `{name}` are {distance:.2} away from those of `{first}`: class `{class}` \
             has {here}, there {there}"
        );
        add(Check::ClassDrift, of, message);
    }
    let distance = length_distance(survey, base);
    if distance > limit.max(chance(survey.rows(), base.rows())) {
        let (here, there) = (survey.length_at(0.5), base.length_at(0.5));
        let unit = doctor.unit;
        let message = format!(
            "lengths of `{name}` are {distance:.2} away from those of `{first}`: half of its rows \
             have up to {here} {unit}, there up to {there}"
        );
        add(Check::LengthDrift, of, message);
    }
}

/// How far samples of two sizes from one distribution may lie apart.
fn chance(n: u64, m: u64) -> f64 {
    if n == 0 || m == 0 {
        return f64::INFINITY;
    }
    CHANCE * 0.5 * (1.0 / n as f64 + 1.0 / m as f64).sqrt()
}

/// Half of the sum of differences between shares (total variation, 0 to 1), and the class that
/// differs most; `None` without classes on both sides.
pub(super) fn class_distance(a: &Survey, b: &Survey) -> Option<(f64, u32)> {
    let (a, b) = (a.classes(), b.classes());
    let total = |counts: &BTreeMap<u32, u64>| counts.values().sum::<u64>() as f64;
    let (all_a, all_b) = (total(a), total(b));
    if all_a == 0.0 || all_b == 0.0 {
        return None;
    }
    let share = |counts: &BTreeMap<u32, u64>, class: u32, all: f64| {
        counts.get(&class).copied().unwrap_or(0) as f64 / all
    };
    let (mut sum, mut most) = (0.0, (0.0, 0));
    let both: BTreeSet<u32> = a.keys().chain(b.keys()).copied().collect();
    for class in both {
        let difference = (share(a, class, all_a) - share(b, class, all_b)).abs();
        sum += difference;
        if difference > most.0 {
            most = (difference, class);
        }
    }
    Some((sum / 2.0, most.1))
}

/// The largest difference between the shares of rows up to a length (Kolmogorov-Smirnov).
pub(super) fn length_distance(a: &Survey, b: &Survey) -> f64 {
    let lengths: BTreeSet<u64> = a.lengths().keys().chain(b.lengths().keys()).copied().collect();
    let (all_a, all_b) = (a.rows().max(1) as f64, b.rows().max(1) as f64);
    let (mut below_a, mut below_b, mut most) = (0, 0, 0.0f64);
    for length in lengths {
        below_a += a.lengths().get(&length).copied().unwrap_or(0);
        below_b += b.lengths().get(&length).copied().unwrap_or(0);
        most = most.max((below_a as f64 / all_a - below_b as f64 / all_b).abs());
    }
    most
}
