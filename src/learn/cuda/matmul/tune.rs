//! Which of the algorithms that the library proposes computes a large product: the fastest.
//!
//! The library guesses; measured, its first choice is up to a sixth slower than the best. The first
//! product of a kind is computed by each a few times. Only those are taken that give the same bits
//! as the first choice, so that the measurements, which differ from run to run, decide about time
//! alone. Numbers of tokens that differ little count as one kind.

// Calls of a C library that is opened at run time, see device.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use anyhow::Result;
use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::{self, cublasLtMatmulAlgoConfigAttributes_t as Config};
use cudarc::driver::{result, sys::CUevent_flags};

use super::{Candidate, Plan, Shape};
use crate::learn::cuda::device::{Device, Mat, failed};

/// Algorithms that are asked for.
const MOST: usize = 8;
/// Multiplications of a product that is worth measuring.
const LARGE: usize = 1 << 32;
/// How often each is timed, in turns: the card's clock changes from moment to moment.
const ROUNDS: usize = 5;
/// The first choice stays unless another takes less than this of its time.
const BETTER: f32 = 0.98;
/// Bytes of a result that are compared, at its begin and at its end.
const SAMPLE: usize = 1 << 20;

/// What makes algorithms for two numbers of tokens the same.
pub(super) type Kind = [i32; ATTRIBUTES.len()];

const ATTRIBUTES: [Config; 6] = [
    Config::CUBLASLT_ALGO_CONFIG_ID,
    Config::CUBLASLT_ALGO_CONFIG_TILE_ID,
    Config::CUBLASLT_ALGO_CONFIG_STAGES_ID,
    Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
    Config::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID,
    Config::CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION,
];

/// Asks the library for algorithms: for one, unless the product is large.
///
/// # Safety
/// All handles are alive.
pub(super) unsafe fn candidates(
    handle: sys::cublasLtHandle_t,
    desc: sys::cublasLtMatmulDesc_t,
    [a, b, c, d]: [sys::cublasLtMatrixLayout_t; 4],
    preference: sys::cublasLtMatmulPreference_t,
    shape: &Shape,
) -> Result<Vec<Candidate>, CublasError> {
    let most = if shape.m * shape.n * shape.k < LARGE { 1 } else { MOST };
    let mut found = [const { std::mem::MaybeUninit::uninit() }; MOST];
    let mut count = 0;
    // Safety: there is room for what is asked for.
    unsafe {
        let to = found.as_mut_ptr().cast();
        sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            desc,
            a,
            b,
            c,
            d,
            preference,
            most as i32,
            to,
            &raw mut count,
        )
    }
    .result()?;
    let found = &found[..count as usize];
    // Safety: the library has filled these.
    let found = found.iter().map(|r: &std::mem::MaybeUninit<_>| unsafe { r.assume_init_read() });
    let found = found.map(|r: sys::cublasLtMatmulHeuristicResult_t| Candidate {
        algo: r.algo,
        workspace: r.workspaceSize,
    });
    let found: Vec<_> = found.collect();
    match found.is_empty() {
        true => Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        false => Ok(found),
    }
}

impl Candidate {
    fn kind(&self) -> Kind {
        ATTRIBUTES.map(|attribute| {
            let (mut value, mut written) = (0i32, 0);
            // Safety: no attribute is longer than the value; what is shorter leaves the rest 0.
            let _ = unsafe {
                let to: *mut c_void = (&raw mut value).cast();
                sys::cublasLtMatmulAlgoConfigGetAttribute(
                    &raw const self.algo,
                    attribute,
                    to,
                    size_of::<i32>(),
                    &raw mut written,
                )
            };
            value
        })
    }
}

impl Shape {
    /// The same for all numbers of tokens that are within a quarter of a power of two.
    fn class(&self) -> Self {
        let up = |x: usize| x.next_multiple_of(1 << x.ilog2().saturating_sub(2));
        Self { m: up(self.m), k: up(self.k), ..*self }
    }
}

impl Device {
    /// Decides which of a plan's algorithms is used from now on; `run` computes the product by one
    /// of them to `to`, again and again if `again`.
    pub(super) fn settle(
        &self,
        plan: &Plan,
        shape: &Shape,
        to: Mat,
        again: bool,
        run: &dyn Fn(usize) -> Result<()>,
    ) -> Result<usize> {
        let class = shape.class();
        let known = self.matmuls.choices.borrow().get(&class).copied();
        let chosen = match known {
            _ if plan.candidates.len() == 1 => 0,
            Some(kind) => plan.candidates.iter().position(|c| c.kind() == kind).unwrap_or(0),
            // Perhaps the next product is one that can be repeated.
            None if !again => return Ok(0),
            None => {
                let chosen = self.fastest(plan, shape, to, run)?;
                let kind = plan.candidates[chosen].kind();
                self.matmuls.choices.borrow_mut().insert(class, kind);
                chosen
            }
        };
        plan.chosen.set(Some(chosen));
        Ok(chosen)
    }

    fn fastest(
        &self,
        plan: &Plan,
        shape: &Shape,
        to: Mat,
        run: &dyn Fn(usize) -> Result<()>,
    ) -> Result<usize> {
        let bytes = ((shape.m - 1) * to.ld + shape.n) * shape.floats.1.size();
        let part = SAMPLE.min(bytes);
        let sample = || -> Result<[Vec<u8>; 2]> {
            let end = to.at + (bytes - part) as u64;
            Ok([self.download(to.at, part)?, self.download(end, part)?])
        };
        let event = || result::event::create(CUevent_flags::CU_EVENT_DEFAULT).map_err(failed);
        let (begin, end) = (event()?, event()?);
        // Safety: events and stream are alive.
        let record = |e| unsafe { result::event::record(e, self.stream) }.map_err(failed);
        run(0)?;
        let wanted = sample()?;
        let mut equal = vec![0];
        for i in 1..plan.candidates.len() {
            // One that does not run is none.
            if run(i).is_ok() && sample()? == wanted {
                equal.push(i);
            }
        }
        let mut times = vec![0.0; plan.candidates.len()];
        for _ in 0..ROUNDS {
            for &i in &equal {
                record(begin)?;
                run(i)?;
                record(end)?;
                self.synchronize()?;
                // Safety: both were recorded, and the stream has passed them.
                times[i] += unsafe { result::event::elapsed(begin, end) }.map_err(failed)?;
            }
        }
        for event in [begin, end] {
            // Safety: it is not used again.
            unsafe { result::event::destroy(event) }.map_err(failed)?;
        }
        let best = equal.into_iter().min_by(|a, b| times[*a].total_cmp(&times[*b])).unwrap_or(0);
        Ok(if times[best] < BETTER * times[0] { best } else { 0 })
    }
}
