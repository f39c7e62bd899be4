//! The lock beside a pipeline.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::digest::Digest;
use crate::source::Fault;
use crate::store::Store;

/// Whether a lock may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LockMode {
    /// New names are asked for and remembered; known ones never change.
    #[default]
    Grow,
    /// A new name is an error (`--locked`).
    Frozen,
    /// Every name is asked for again, and what it is now is remembered (`flow update`).
    Update,
}

/// The lock beside a pipeline: identities of outside things (commits of datasets and models,
/// digests of URLs) by name. One `name = identity` a line, sorted, meant to be committed.
#[derive(Debug, Default)]
pub struct Lock {
    path: PathBuf,
    mode: LockMode,
    entries: BTreeMap<String, String>,
    asked: BTreeMap<String, String>,
    changed: bool,
}

const HEADER: &str = "\
# Identities of what this pipeline takes from outside. Written by flow; commit it.
# `flow run` adds what is missing and never changes a line; `flow update` does.
";

impl Lock {
    /// Reads a lock; a file that does not exist is an empty lock.
    ///
    /// # Errors
    /// When it cannot be read, or a line is not `name = identity`.
    pub fn load(path: &Path, mode: LockMode) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        let mut lock = Self { path: path.into(), mode, ..Self::default() };
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let place = || format!("{}:{}", path.display(), number + 1);
            let whole = |(name, identity): &(&str, &str)| {
                let identity = identity.trim();
                let blank = identity.is_empty() || identity.contains(char::is_whitespace);
                !name.trim().is_empty() && !blank
            };
            let Some((name, identity)) = line.rsplit_once(" = ").filter(whole) else {
                let fault = Fault::new(format!("{}: expected `name = identity`", place()));
                let help = "mend or remove this line; what a lock lacks is looked up again";
                return Err(fault.help(help).into());
            };
            let (name, identity) = (name.trim().to_owned(), identity.trim().to_owned());
            if let Some(other) = lock.entries.insert(name.clone(), identity.clone())
                && other != identity
            {
                let fault = Fault::new(format!("{}: `{name}` stands here twice", place()));
                let help = "keep one of the two lines (a merge left both)";
                return Err(fault.help(help).into());
            }
        }
        Ok(lock)
    }

    /// The identity of an outside name; asked for, and remembered, if it is new.
    ///
    /// # Errors
    /// When the lock must not grow (`--locked`), or asking fails.
    pub fn get_or_insert(
        &mut self,
        name: &str,
        ask: impl FnOnce() -> Result<String>,
    ) -> Result<String> {
        if let Some(known) = self.asked.get(name) {
            return Ok(known.clone());
        }
        match (self.entries.get(name), self.mode) {
            (Some(known), LockMode::Grow | LockMode::Frozen) => return Ok(known.clone()),
            (None, LockMode::Frozen) => {
                let path = self.path.display();
                let fault = Fault::new(format!("`{name}` is not in {path}"));
                return Err(fault.help("run once without --locked, and commit the lock").into());
            }
            _ => {}
        }
        anyhow::ensure!(!name.contains(['\n', '\r']), "an outside name must be one line: {name:?}");
        let identity = ask()?;
        anyhow::ensure!(
            !identity.is_empty() && !identity.contains(['\n', '\r', ' ']),
            "`{identity}` is no identity for `{name}`"
        );
        self.changed |= self.entries.get(name) != Some(&identity);
        self.entries.insert(name.to_owned(), identity.clone());
        self.asked.insert(name.to_owned(), identity.clone());
        Ok(identity)
    }

    /// What it knows, by name.
    pub fn entries(&self) -> &BTreeMap<String, String> {
        &self.entries
    }

    /// Whether something is to be saved.
    pub fn changed(&self) -> bool {
        self.changed
    }

    /// Writes it, if something was added or changed. What another run added meanwhile is kept.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&mut self, store: &Store) -> Result<()> {
        if !self.changed {
            return Ok(());
        }
        let place = std::path::absolute(&self.path)?;
        let place = Digest::of(place.as_os_str().as_encoded_bytes()).short();
        let _lease = store.lease(&format!("lock-{place}"), "")?;
        for (name, identity) in Self::load(&self.path, self.mode)?.entries {
            if !self.asked.contains_key(&name) {
                self.entries.entry(name).or_insert(identity);
            }
        }
        let mut text = HEADER.to_owned();
        for (name, identity) in &self.entries {
            text.push_str(&format!("{name} = {identity}\n"));
        }
        store.write_atomic(&self.path, text.as_bytes())?;
        self.changed = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, Store, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let path = dir.path().join("p.lock");
        (dir, store, path)
    }

    #[test]
    fn an_identity_is_one_word() {
        let (_dir, _store, path) = place();
        for bad in ["hub:a = ", "hub:a = 1 2", "hub:a = \u{c}= \u{c}2", " = 1", "hub:a=1"] {
            std::fs::write(&path, bad).unwrap();
            let e = Lock::load(&path, LockMode::Grow).expect_err(bad);
            assert!(e.to_string().contains(":1: expected `name = identity`"), "{e}");
        }
    }

    #[test]
    fn grows_and_never_changes() {
        let (_dir, store, path) = place();
        let mut lock = Lock::load(&path, LockMode::Grow).unwrap();
        assert_eq!(lock.get_or_insert("url:b = c", || Ok("2".into())).unwrap(), "2");
        assert_eq!(lock.get_or_insert("hub:a", || Ok("1".into())).unwrap(), "1");
        lock.save(&store).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(lines, ["hub:a = 1", "url:b = c = 2"]);
        let mut lock = Lock::load(&path, LockMode::Grow).unwrap();
        let known = lock.get_or_insert("url:b = c", || anyhow::bail!("asked")).unwrap();
        assert_eq!((known.as_str(), lock.changed()), ("2", false));
    }

    #[test]
    fn frozen_refuses_growth_and_update_changes() {
        let (_dir, store, path) = place();
        std::fs::write(&path, "hub:a = 1\n").unwrap();
        let mut lock = Lock::load(&path, LockMode::Frozen).unwrap();
        assert_eq!(lock.get_or_insert("hub:a", || Ok("9".into())).unwrap(), "1");
        let error = lock.get_or_insert("hub:b", || Ok("2".into())).unwrap_err();
        assert!(error.to_string().contains("`hub:b` is not in"), "{error}");
        let mut lock = Lock::load(&path, LockMode::Update).unwrap();
        assert_eq!(lock.get_or_insert("hub:a", || Ok("9".into())).unwrap(), "9");
        lock.save(&store).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("hub:a = 9\n"));
    }

    #[test]
    fn a_merge_conflict_is_said() {
        let (_dir, _store, path) = place();
        std::fs::write(&path, "hub:a = 1\nhub:a = 2\n").unwrap();
        let error = Lock::load(&path, LockMode::Grow).unwrap_err().to_string();
        assert!(error.contains("p.lock:2") && error.contains("twice"), "{error}");
        std::fs::write(&path, "<<<<<<< HEAD\n").unwrap();
        assert!(Lock::load(&path, LockMode::Grow).is_err());
    }
}
