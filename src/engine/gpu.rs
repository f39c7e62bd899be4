//! GPUs as CUDA names them.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

/// A GPU, as `CUDA_VISIBLE_DEVICES` names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Gpu {
    /// By its place among those of the machine.
    Index(u32),
    /// By the driver's own name: `GPU-8932f937-…` (or a beginning of it), `MIG-…` for a part.
    Id(String),
}

impl Gpu {
    /// Those that a value of `CUDA_VISIBLE_DEVICES` lets a program see. As for CUDA itself, the
    /// first word that names none (`-1`, `none`) ends the list.
    pub fn listed(value: &str) -> Vec<Self> {
        value.split(',').map_while(|word| Self::parse(word.trim())).collect()
    }

    fn parse(word: &str) -> Option<Self> {
        let named = |start: &str| word.strip_prefix(start).is_some_and(|rest| !rest.is_empty());
        match word.parse() {
            Ok(index) => Some(Self::Index(index)),
            Err(_) if named("GPU-") || named("MIG-") => Some(Self::Id(word.to_owned())),
            Err(_) => None,
        }
    }
}

impl Display for Gpu {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => index.fmt(f),
            Self::Id(id) => id.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_listed_by_index_or_name() {
        let listed = |value| {
            Gpu::listed(value).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(listed("0, 3"), "0 3");
        let names = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-GPU-8932/1/0,MIG-0a1b";
        assert_eq!(listed(names), names.replace(',', " "));
        // What names none ends the list; an empty one lets nothing be seen.
        assert_eq!(listed("1,-1,2"), "1");
        for none in ["", "-1", "none", "NoDevFiles", "GPU-", "MIG-"] {
            assert_eq!(listed(none), "", "{none}");
        }
    }

    #[test]
    fn in_events_an_index_is_a_number() {
        let gpus = Gpu::listed("1,GPU-8932");
        let text = serde_json::to_string(&gpus).unwrap();
        assert_eq!(text, r#"[1,"GPU-8932"]"#);
        assert_eq!(serde_json::from_str::<Vec<Gpu>>(&text).unwrap(), gpus);
    }
}
