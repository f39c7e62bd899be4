//! Folders of attempts that are over, for other attempts of the same run.
//!
//! To make the half dozen folders of a trivial attempt and to remove them again costs as much as
//! the process that works in them. What may not follow is that one attempt finds, or is given
//! later, anything of another. So a folder is used again only if its step says that nothing that it
//! started is left ([`Dirs::leave_tidy`]); it has another name each time, and is emptied of all but
//! folders, which must be as new ones are (owner, mode, flags, no attributes, nothing mounted).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::Result;

use super::scratch::{self, Spent};
use crate::step::{Dirs, Shelf, Step};
use crate::store::{Look, Store};

/// A folder that nobody works in, with those in it.
struct Room {
    dir: PathBuf,
    dirs: BTreeSet<PathBuf>,
}

/// The folders of a run's attempts.
pub(super) struct Rooms<'a> {
    store: &'a Store,
    free: Mutex<Vec<Room>>,
    /// That of the first of them, new.
    look: OnceLock<Option<Look>>,
    /// Takes what attempts leave behind.
    rest: PathBuf,
    /// Lies there, too.
    shelf: Arc<Shelf>,
    spent: Spent,
}

impl<'a> Rooms<'a> {
    pub(super) fn new(store: &'a Store, run: &str) -> Self {
        let (free, spent, rest) = (Mutex::default(), Spent::default(), scratch::rest(store, run));
        let shelf = Arc::new(Shelf::new(rest.clone()));
        Self { store, free, look: OnceLock::new(), rest, shelf, spent }
    }

    /// Makes an attempt's folder, or gives it one that is there.
    pub(super) fn enter(&self, dir: &Path, step: &dyn Step) -> Result<Dirs> {
        let disk = self.store.disk();
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let room = step.shares_dirs().then(free).flatten();
        if let Some(room) = room
            && disk.rename(&room.dir, dir).is_ok()
        {
            let moved = |below: &PathBuf| Some(dir.join(below.strip_prefix(&room.dir).ok()?));
            return Ok(Dirs::with(room.dirs.iter().filter_map(moved).collect(), &self.shelf));
        }
        // Nobody else has its name.
        disk.create_new_dir(dir)?;
        self.look.get_or_init(|| Look::of(dir));
        Ok(Dirs::default())
    }

    /// Takes back the folder of an attempt that is over.
    pub(super) fn leave(&self, dir: PathBuf, dirs: &Dirs) {
        if dirs.are_tidy()
            && let Some(Some(look)) = self.look.get()
            && let Ok(dirs) = self.store.disk().vacate(&dir, look, &self.rest)
        {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(Room { dir, dirs });
        } else {
            self.spent.remove(self.store, dir);
        }
    }

    /// Removes all of them.
    pub(super) fn clear(&self) {
        let free = std::mem::take(&mut *self.free.lock().unwrap_or_else(PoisonError::into_inner));
        for dir in free.into_iter().map(|room| room.dir).chain([self.rest.clone()]) {
            self.spent.later(dir);
        }
        self.spent.clear(self.store);
    }
}
