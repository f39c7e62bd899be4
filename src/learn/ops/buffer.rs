//! Memory for numbers that is used again: a page that is new to the process costs more than most
//! loops over it.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What no buffer uses at the moment.
struct Pool {
    /// The longest unused first.
    free: Vec<Vec<f32>>,
    /// Numbers in `free`.
    spare: usize,
    /// Numbers in buffers.
    used: usize,
    /// The most that were ever in buffers at once.
    peak: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { free: Vec::new(), spare: 0, used: 0, peak: 0 });

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// The smallest free memory that holds `len` and is not much larger.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let fits = |v: &Vec<f32>| v.len() >= len && v.len() <= len + len / 2 + 4096;
        let all = self.free.iter().enumerate().filter(|(_, v)| fits(v));
        let (at, _) = all.min_by_key(|(_, v)| v.len())?;
        let found = self.free.remove(at);
        self.spare -= found.len();
        Some(found)
    }

    /// Lets go of so much that `more` numbers can be had within a quarter above the peak.
    fn make_room(&mut self, more: usize) {
        let most = self.peak.max(self.used + more) / 4 * 5;
        let too_many = (self.used + self.spare + more).saturating_sub(most);
        let (mut count, mut gone) = (0, 0);
        while gone < too_many && count < self.free.len() {
            gone += self.free[count].len();
            count += 1;
        }
        self.free.drain(..count);
        self.spare -= gone;
    }
}

/// Numbers in memory that other buffers use before and after.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// All that there is, at least `len`.
    data: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// So many numbers, of which nothing is known.
    pub(crate) fn new(len: usize) -> Self {
        let mut pool = pool();
        let data = pool.take(len).unwrap_or_else(|| {
            pool.make_room(len);
            vec![0.0; len]
        });
        pool.used += data.len();
        pool.peak = pool.peak.max(pool.used);
        Self { data, len }
    }

    /// So many zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy.
    pub(crate) fn of(data: &[f32]) -> Self {
        let mut buffer = Self::new(data.len());
        buffer.copy_from_slice(data);
        buffer
    }

    /// Gives back to the system what no buffer uses.
    pub(crate) fn release() {
        let mut pool = pool();
        (pool.free, pool.spare, pool.peak) = (Vec::new(), 0, pool.used);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut pool = pool();
        pool.used -= data.len();
        pool.spare += data.len();
        pool.free.push(data);
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_but_not_hoarded() {
        let mut pool = Pool {
            free: vec![vec![0.0; 9000], vec![0.0; 5000]],
            spare: 14_000,
            used: 0,
            peak: 10_000,
        };
        assert_eq!(pool.take(4900).map(|v| v.len()), Some(5000));
        assert!(pool.take(9001).is_none() && pool.take(100).is_none());
        pool.make_room(4000);
        assert_eq!((pool.free.len(), pool.spare), (0, 0));
    }

    #[test]
    fn a_buffer_is_as_long_as_asked() {
        let first = Buffer::of(&[1.0; 70_000]);
        drop(first);
        let again = Buffer::zeros(69_000);
        assert!(again.len() == 69_000 && again.iter().all(|x| *x == 0.0));
    }
}
