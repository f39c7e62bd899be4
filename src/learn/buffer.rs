//! Memory for numbers that is used again: a page that is new to the process costs more than most
//! loops over it.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What no buffer uses at the moment.
pub(crate) struct Pool<T> {
    /// The longest unused first.
    free: Vec<Vec<T>>,
    /// Numbers in `free`.
    spare: usize,
    /// Numbers in buffers.
    used: usize,
    /// The most that were ever in buffers at once.
    peak: usize,
}

/// Numbers that buffers are made of.
pub(crate) trait Pooled: Copy + Default + 'static {
    #[doc(hidden)]
    fn pool() -> MutexGuard<'static, Pool<Self>>;
}

macro_rules! pooled {
    ($($number:ty),*) => {$(
        impl Pooled for $number {
            fn pool() -> MutexGuard<'static, Pool<Self>> {
                static POOL: Mutex<Pool<$number>> = Mutex::new(Pool::new());
                POOL.lock().unwrap_or_else(PoisonError::into_inner)
            }
        }
    )*};
}
pooled!(f32, u16);

impl<T> Pool<T> {
    const fn new() -> Self {
        Self { free: Vec::new(), spare: 0, used: 0, peak: 0 }
    }

    /// The smallest free memory that holds `len` and is not much larger; of several, what was in
    /// use last, which may still be in a cache.
    fn take(&mut self, len: usize) -> Option<Vec<T>> {
        let fits = |v: &Vec<T>| v.len() >= len && v.len() <= len + len / 2 + 4096;
        let all = self.free.iter().enumerate().rev().filter(|(_, v)| fits(v));
        let (at, _) = all.min_by_key(|(_, v)| v.len())?;
        let found = self.free.remove(at);
        self.spare -= found.len();
        Some(found)
    }

    /// Lets go of so much that `more` numbers can be had within half above the peak. (The
    /// activations of a step and its gradients are there at different times and of different sizes;
    /// with less room they would take turns in going back to the system.)
    fn make_room(&mut self, more: usize) {
        let most = self.peak.max(self.used + more) / 2 * 3;
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

/// Numbers in memory that other buffers use before and after; they begin at a line of the cache.
#[derive(Debug)]
pub(crate) struct Buffer<T: Pooled = f32> {
    /// All that there is.
    data: Vec<T>,
    /// The first number of a line of the cache.
    start: usize,
    len: usize,
}

/// Bytes of a line of the cache: what tiles and vectors like their rows to begin at.
const LINE: usize = 64;

impl<T: Pooled> Buffer<T> {
    /// So many numbers, of which nothing is known.
    pub(crate) fn new(len: usize) -> Self {
        let room = len + LINE / size_of::<T>();
        let mut pool = T::pool();
        let data = pool.take(room).unwrap_or_else(|| {
            pool.make_room(room);
            vec![T::default(); room]
        });
        pool.used += data.len();
        pool.peak = pool.peak.max(pool.used);
        let start = data.as_ptr().align_offset(LINE);
        Self { data, start, len }
    }

    /// So many zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(T::default());
        buffer
    }

    /// A copy.
    pub(crate) fn of(data: &[T]) -> Self {
        let mut buffer = Self::new(data.len());
        buffer.copy_from_slice(data);
        buffer
    }
}

impl<T: Pooled> AsMut<[T]> for Buffer<T> {
    fn as_mut(&mut self) -> &mut [T] {
        self
    }
}

/// Gives back to the system what no buffer uses.
pub(crate) fn release() {
    fn of<T: Pooled>() {
        let mut pool = T::pool();
        (pool.free, pool.spare, pool.peak) = (Vec::new(), 0, pool.used);
    }
    of::<f32>();
    of::<u16>();
}

impl<T: Pooled> Drop for Buffer<T> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut pool = T::pool();
        pool.used -= data.len();
        pool.spare += data.len();
        pool.free.push(data);
    }
}

impl<T: Pooled> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..][..self.len]
    }
}

impl<T: Pooled> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_but_not_hoarded() {
        let mut pool = Pool {
            free: vec![vec![0.0f32; 9000], vec![0.0; 5000]],
            spare: 14_000,
            used: 0,
            peak: 10_000,
        };
        assert_eq!(pool.take(4900).map(|v| v.len()), Some(5000));
        assert!(pool.take(9001).is_none() && pool.take(100).is_none());
        pool.make_room(7000);
        assert_eq!((pool.free.len(), pool.spare), (0, 0));
        (pool.free, pool.spare) = (vec![vec![1.0; 5000], vec![2.0; 5000]], 10_000);
        assert_eq!(pool.take(4900).map(|v| v[0]), Some(2.0));
    }

    #[test]
    fn a_buffer_is_as_long_as_asked() {
        let first = Buffer::of(&[1.0f32; 70_000]);
        drop(first);
        let again = Buffer::<f32>::zeros(69_000);
        assert!(again.len() == 69_000 && again.iter().all(|x| *x == 0.0));
        assert_eq!(again.as_ptr().align_offset(LINE), 0);
    }
}
