//! Pins: results that are never collected, each a file `pins/<name>` in the store.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Loaded, Record};
use crate::digest::Digest;
use crate::source::{Fault, suggest};
use crate::store::Store;

/// Results that stay, with all that they were made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The name of its file.
    #[serde(skip)]
    pub name: String,
    /// What was pinned, as people know it (`train@lora.r=8 of run 20261124-033012-ab12`).
    pub what: String,
    /// The run whose journal stays too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// Keys of the results.
    pub keys: BTreeSet<Digest>,
    /// Unix milliseconds.
    pub pinned_unix_ms: u64,
}

/// The pins of a store.
#[derive(Debug, Clone)]
pub struct Pins {
    store: Store,
}

impl Pins {
    /// Longest name of a pin.
    pub const LONGEST: usize = 120;

    /// The pins of a store.
    pub fn of(store: &Store) -> Self {
        Self { store: store.clone() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.store.root().join("pins").join(name)
    }

    /// All pins, by name.
    ///
    /// # Errors
    /// When one cannot be read: what it stands for would be collected.
    pub fn list(&self) -> Result<Vec<Pin>> {
        let items = self.store.items("pins")?;
        // A name with a dot in front is a file on its way.
        let items = items.into_iter().filter(|item| !item.name().starts_with('.'));
        let pins = items.map(|item| {
            let text = std::fs::read(&item.path)
                .with_context(|| format!("reading the pin {}", item.path.display()))?;
            let pin: Pin = serde_json::from_slice(&text).map_err(|e| {
                let fault = Fault::new(format!("{} is not a pin", item.path.display()));
                let name = item.name();
                let help = format!("`flow pin --remove {name}`, and pin again what is to stay");
                fault.help(help).cause(e)
            })?;
            Ok(Pin { name: item.name().to_owned(), ..pin })
        });
        pins.collect()
    }

    /// Pins results that are there.
    ///
    /// # Errors
    /// When the name is taken or cannot be a file's, a result is lost, or the disk refuses.
    pub fn add(&self, pin: &Pin) -> Result<()> {
        let name = pin.name.as_str();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-@=,+".contains(c);
        if name.is_empty()
            || name.starts_with('.')
            || name.len() > Self::LONGEST
            || !name.chars().all(plain)
        {
            let fault = Fault::new(format!("`{name}` cannot be the name of a pin"));
            let help = "letters, digits and . _ - @ = , + are fine, no dot in front, at most 120";
            return Err(fault.help(help).into());
        }
        // From here until it is written, nothing that it names may be swept away.
        let _shared = self.store.lock_shared()?;
        if self.path(name).exists() {
            let fault = Fault::new(format!("there is a pin `{name}` already"));
            return Err(fault.help("give another --name, or remove that one first").into());
        }
        for key in &pin.keys {
            let Loaded::Found(record) = Record::load(&self.store, key)? else {
                anyhow::bail!("there is no whole record of key {}", key.short());
            };
            for tree in record.ports.values() {
                if let Some(reason) = self.store.missing(tree)? {
                    let step = &record.made.step;
                    let fault = Fault::new(format!("the result of {step} is lost: {reason}"));
                    return Err(fault.help("run the pipeline again, then pin it").into());
                }
            }
        }
        ensure!(!pin.keys.is_empty(), "there is no result to pin");
        let mut text = serde_json::to_vec_pretty(pin)?;
        text.push(b'\n');
        Ok(self.store.write_atomic(&self.path(name), &text)?)
    }

    /// Removes a pin; what it stood for stays until the next collection.
    ///
    /// # Errors
    /// When there is none of this name, or the disk refuses.
    pub fn remove(&self, name: &str) -> Result<()> {
        let names: Vec<String> =
            self.store.items("pins")?.iter().map(|item| item.name().to_owned()).collect();
        if names.iter().any(|known| known == name) {
            return self.store.remove(&self.path(name));
        }
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        let help = suggest(name, &known).unwrap_or_else(|| "there are no pins".into());
        Err(Fault::new(format!("there is no pin `{name}`")).help(help).into())
    }
}
