//! BLAKE3 digests and the canonical encoding that keys are computed over.
//!
//! The encoding is typed and length-prefixed, so that no two different values share bytes
//! (`"1"` and `1`, an absent field and `null`, `["a","b"]` and `["ab"]`), and so that nothing
//! depends on map order, float formatting or a dependency's `preserve_order` switch.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A BLAKE3-256 digest. `Display` gives all 64 hex digits, [`Digest::short`] the first 8.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest and length of a file's content.
    ///
    /// # Errors
    /// When the file cannot be opened or read.
    pub fn of_file(path: &Path) -> io::Result<(Self, u64)> {
        // Read, not mapped: a file that is cut while it is mapped ends the process.
        const CHUNK: u64 = 8 << 20;
        const PARALLEL: usize = 256 << 10;
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut hasher = blake3::Hasher::new();
        let mut chunk = Vec::with_capacity(usize::try_from(size.min(CHUNK) + 1).unwrap_or(1));
        loop {
            chunk.clear();
            file.by_ref().take(CHUNK).read_to_end(&mut chunk)?;
            match chunk.len() {
                0 => break,
                PARALLEL.. => hasher.update_rayon(&chunk),
                _ => hasher.update(&chunk),
            };
            if (chunk.len() as u64) < CHUNK {
                break;
            }
        }
        Ok((Self(*hasher.finalize().as_bytes()), hasher.count()))
    }

    /// The digest of a value's [canonical encoding](canonical) under a domain such as
    /// `flow/step/v1`, so that equal values of different meaning never share a digest.
    ///
    /// # Errors
    /// When the value holds a number that has no canonical form.
    pub fn of_value(domain: &str, value: &Value) -> Result<Self, NotCanonical> {
        let mut bytes = Vec::with_capacity(256);
        put(&mut bytes, b'd', domain.as_bytes());
        encode(&mut bytes, value)?;
        Ok(Self::of(&bytes))
    }

    /// What [`Digest::of_value`] gives for an object of one field that holds a list, without a
    /// value of the whole: there may be millions of items.
    ///
    /// # Errors
    /// When an item cannot be made, or holds a number that has no canonical form.
    pub fn of_list(
        domain: &str,
        field: &str,
        items: impl ExactSizeIterator<Item = serde_json::Result<Value>>,
    ) -> anyhow::Result<Self> {
        const ENOUGH: usize = 64 << 10;
        let (mut hasher, mut bytes) = (blake3::Hasher::new(), Vec::with_capacity(256));
        put(&mut bytes, b'd', domain.as_bytes());
        put(&mut bytes, b'm', &1_u64.to_le_bytes());
        put(&mut bytes, b'k', field.as_bytes());
        put(&mut bytes, b'a', &(items.len() as u64).to_le_bytes());
        for item in items {
            encode(&mut bytes, &item?)?;
            if bytes.len() >= ENOUGH {
                hasher.update(&bytes);
                bytes.clear();
            }
        }
        hasher.update(&bytes);
        Ok(Self(*hasher.finalize().as_bytes()))
    }

    /// Bytes of a digest.
    pub const LENGTH: usize = 32;

    /// The raw bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }

    /// From raw bytes (a finished [`blake3::Hasher`]).
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The first eight hex digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

/// Text that is not 64 lower-case hex digits.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a digest (64 hex digits)")]
pub struct NotADigest(String);

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(s: &str) -> Result<Self, NotADigest> {
        let bad = || NotADigest(s.to_owned());
        if s.len() != 64 || !s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(bad());
        }
        let mut out = [0; 32];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(out))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A number with no canonical form.
#[derive(Debug, thiserror::Error)]
#[error("{0} cannot be part of a key: only finite numbers can")]
pub struct NotCanonical(String);

/// The canonical bytes of a JSON value: a type tag, a length, the content. Map keys are sorted by
/// bytes; integers are 64-bit; a float that is a whole number stays a float; `-0.0` is `0.0`.
///
/// # Errors
/// When a number is neither a 64-bit integer nor a finite float.
pub fn canonical(value: &Value) -> Result<Vec<u8>, NotCanonical> {
    let mut bytes = Vec::with_capacity(256);
    encode(&mut bytes, value)?;
    Ok(bytes)
}

fn put(out: &mut Vec<u8>, tag: u8, content: &[u8]) {
    out.push(tag);
    out.extend_from_slice(&(content.len() as u64).to_le_bytes());
    out.extend_from_slice(content);
}

fn encode(out: &mut Vec<u8>, value: &Value) -> Result<(), NotCanonical> {
    match value {
        Value::Null => out.push(b'n'),
        Value::Bool(b) => out.extend_from_slice(&[b'b', u8::from(*b)]),
        Value::Number(n) => {
            if let Some(i) = n.as_i64() {
                put(out, b'i', &i.to_le_bytes());
            } else if let Some(u) = n.as_u64() {
                put(out, b'u', &u.to_le_bytes());
            } else {
                let x = n.as_f64().filter(|x| x.is_finite());
                let x = x.ok_or_else(|| NotCanonical(n.to_string()))?;
                let x = if x == 0.0 { 0.0 } else { x };
                put(out, b'f', &x.to_bits().to_le_bytes());
            }
        }
        Value::String(s) => put(out, b's', s.as_bytes()),
        Value::Array(items) => {
            put(out, b'a', &(items.len() as u64).to_le_bytes());
            for item in items {
                encode(out, item)?;
            }
        }
        Value::Object(map) => {
            put(out, b'm', &(map.len() as u64).to_le_bytes());
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort_unstable();
            for key in keys {
                put(out, b'k', key.as_bytes());
                encode(out, &map[key])?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn d(v: &Value) -> Digest {
        Digest::of_value("test", v).unwrap()
    }

    #[test]
    fn order_of_keys_does_not_matter() {
        let a: Value = serde_json::from_str(r#"{"a":1,"b":[2,3]}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"b":[2,3],"a":1}"#).unwrap();
        assert_eq!(d(&a), d(&b));
    }

    #[test]
    fn a_list_is_as_the_value_of_all_of_it() {
        for n in [0, 1, 3, 5_000] {
            let items: Vec<Value> = (0..n).map(|i| json!({ "path": format!("f{i}") })).collect();
            let list = Digest::of_list("test", "entries", items.iter().cloned().map(Ok)).unwrap();
            assert_eq!(list, d(&json!({ "entries": items })), "{n}");
        }
    }

    #[test]
    fn types_and_boundaries_matter() {
        let values = [
            json!(1),
            json!("1"),
            json!(1.0),
            json!(true),
            json!(null),
            json!([]),
            json!({}),
            json!(["a", "b"]),
            json!(["ab"]),
            json!({"a": null}),
            json!([1]),
        ];
        for (i, a) in values.iter().enumerate() {
            for (j, b) in values.iter().enumerate() {
                assert_eq!(i == j, d(a) == d(b), "{a} {b}");
            }
        }
        assert_eq!(d(&json!(-0.0)), d(&json!(0.0)));
        assert_ne!(Digest::of_value("x", &json!(1)).unwrap(), d(&json!(1)));
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            // Close together, so that equal values of different types meet.
            (-3..3_i64).prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-3..3_i64).prop_map(|i| Value::from(i as f64)),
            any::<f64>().prop_filter("finite", |x| x.is_finite()).prop_map(Value::from),
            "[a-c1é]{0,3}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-c]{0,2}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn bytes_are_equal_where_values_are(a in value(), b in value()) {
            let (one, other) = (canonical(&a).unwrap(), canonical(&b).unwrap());
            prop_assert_eq!(a == b, one == other, "{} {}", a, b);
        }

        /// So no value can run over into the next: a list of values is told from every other.
        #[test]
        fn no_bytes_begin_others(a in value(), b in value()) {
            let (one, other) = (canonical(&a).unwrap(), canonical(&b).unwrap());
            prop_assert!(one == other || !other.starts_with(&one), "{} {}", a, b);
        }

        #[test]
        fn text_and_back_changes_nothing(a in value()) {
            let back: Value = serde_json::from_str(&a.to_string()).unwrap();
            prop_assert_eq!(d(&a), d(&back));
        }
    }

    /// Pinned: other bytes here are other keys for every step there is.
    #[test]
    fn the_encoding_stays() {
        let value = json!({ "b": [null, true, -1, u64::MAX, 0.1, "é"], "a": { "": [] } });
        let key = Digest::of_value("flow/step/v1", &value).unwrap();
        assert_eq!(key.short(), "ae940bae");
    }

    #[test]
    fn hex_round_trips() {
        let a = Digest::of(b"flow");
        assert_eq!(a.to_string().parse::<Digest>().unwrap(), a);
        assert!("abc".parse::<Digest>().is_err());
        assert!("Z".repeat(64).parse::<Digest>().is_err());
    }
}
