//! Which of the library's algorithms is the fastest for a large product.
//!
//! The library guesses; on an H100 its guess took up to 24 % longer than the best of its first 8.
//! Only algorithms that make each sum in one piece are tried, and only one that gives the same bits
//! as the library's guess is taken: what is computed depends on no clock.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Algorithm, Plan, Product, Shape};
use crate::learn::cuda::device::Device;

/// Multiply-adds of a product that is worth the time, at least.
const LARGE: usize = 1 << 32;

/// Rows of the results that are compared.
const ROWS: usize = 16;

/// What a trial of one algorithm may take, about.
const TRIAL: Duration = Duration::from_millis(2);

/// As this part of the guess's time an algorithm has to be, or the guess is kept.
const FASTER: f64 = 0.99;

impl Device {
    /// The fastest of algorithms for a product. Products of about as many rows take the same: in a
    /// run whose batches are of different lengths few are tried out.
    pub(super) fn fastest(
        &self,
        plan: &Plan,
        shape: &Shape,
        product: &Product,
        all: &[Algorithm],
    ) -> Result<Algorithm> {
        let guess = plan.algorithm;
        if shape.m * shape.n * shape.k < LARGE || !guess.whole_sums() {
            return Ok(guess);
        }
        let alike = Shape { m: shape.m.next_power_of_two(), ..*shape };
        let known = self.matmuls.fastest.borrow().get(&alike).copied();
        if let Some(known) = known {
            return Ok(all.iter().find(|a| a.algo.data == known.data).copied().unwrap_or(guess));
        }
        // What is added to itself is different after each trial.
        if product.target.plus.is_some_and(|plus| plus.at == product.target.to.at) {
            return Ok(guess);
        }
        let found = self.try_out(plan, shape, product, all)?;
        self.matmuls.fastest.borrow_mut().insert(alike, found.algo);
        Ok(found)
    }

    fn try_out(
        &self,
        plan: &Plan,
        shape: &Shape,
        product: &Product,
        all: &[Algorithm],
    ) -> Result<Algorithm> {
        let guess = plan.algorithm;
        self.multiply(plan, guess, product)?;
        let expected = self.sample(shape, product)?;
        let mut same = vec![guess];
        for other in all.iter().skip(1).filter(|a| a.whole_sums()) {
            // One that the library then refuses is no candidate.
            if self.multiply(plan, *other, product).is_ok()
                && self.sample(shape, product)? == expected
            {
                same.push(*other);
            }
        }
        let mut times = vec![f64::INFINITY; same.len()];
        let mut repeats = 2;
        for _ in 0..3 {
            for (algorithm, time) in same.iter().zip(&mut times) {
                let start = Instant::now();
                for _ in 0..repeats {
                    self.multiply(plan, *algorithm, product)?;
                }
                self.synchronize()?;
                *time = time.min(start.elapsed().as_secs_f64() / f64::from(repeats));
            }
            repeats = (TRIAL.as_secs_f64() / times[0]).clamp(2.0, 20.0) as u32;
        }
        let best = times.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |b| b.0);
        Ok(if times[best] < FASTER * times[0] { same[best] } else { guess })
    }

    /// Some rows of a product's result, as bytes.
    fn sample(&self, shape: &Shape, product: &Product) -> Result<Vec<u8>> {
        let target = product.target;
        let size = target.float.size();
        let mut bytes = Vec::new();
        for i in 0..ROWS.min(shape.m) {
            let row = i * (shape.m - 1) / (ROWS - 1).min(shape.m - 1).max(1);
            let at = target.to.at + (row * target.to.ld * size) as u64;
            bytes.extend(self.download::<u8>(at, shape.n * size)?);
        }
        Ok(bytes)
    }
}
