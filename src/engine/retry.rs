//! How long a step that failed waits before it is tried again.

use std::time::Duration;

use crate::digest::Digest;
use crate::pipeline::Retry;

/// The longest pause, unless the first is longer.
const LONGEST: Duration = Duration::from_secs(600);

/// The pause after an attempt (from 1) that failed: it doubles each time, and up to a tenth is
/// added, so that steps that failed together do not all come back together. What is added follows
/// from the key: the same every time.
pub(super) fn pause(retry: Retry, key: &Digest, attempt: u32) -> Duration {
    let doubled = 2_u32.checked_pow(attempt.saturating_sub(1));
    let pause = doubled.and_then(|n| retry.backoff.checked_mul(n)).unwrap_or(LONGEST);
    let pause = pause.min(LONGEST.max(retry.backoff));
    let seed = Digest::of(format!("{key} {attempt}").as_bytes()).to_string();
    let share = u16::from_str_radix(&seed[..4], 16).unwrap_or(0);
    pause + pause.mul_f64(0.1 * f64::from(share) / f64::from(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        let retry = Retry { times: 40, backoff: Duration::from_secs(10) };
        let key = Digest::of(b"key");
        for (attempt, least) in [(1, 10), (2, 20), (3, 40), (7, 600), (40, 600)] {
            let (pause, least) = (pause(retry, &key, attempt), Duration::from_secs(least));
            assert!(least <= pause && pause <= least.mul_f64(1.1), "{attempt}: {pause:?}");
        }
        let patient = Retry { backoff: Duration::from_secs(3600), ..retry };
        assert!(pause(patient, &key, 2) < Duration::from_secs(3961));
    }

    #[test]
    fn what_is_added_follows_from_the_key() {
        let retry = Retry { times: 1, backoff: Duration::from_secs(10) };
        let of = |name: &str| pause(retry, &Digest::of(name.as_bytes()), 1);
        assert_eq!(of("a"), of("a"));
        assert_ne!(of("a"), of("b"));
    }
}
