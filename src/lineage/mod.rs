//! Records, runs, the lock.

use anyhow::Result;

/// The lock beside a pipeline: outside identities by name.
#[derive(Debug, Default)]
pub struct Lock {}

impl Lock {
    /// The identity of an outside name; asked for, and remembered, if it is new.
    ///
    /// # Errors
    /// When the lock must not grow (`--locked`), or asking fails.
    pub fn get_or_insert(
        &mut self,
        _name: &str,
        _ask: impl FnOnce() -> Result<String>,
    ) -> Result<String> {
        todo!()
    }
}
