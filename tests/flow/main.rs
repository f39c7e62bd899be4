//! The one integration-test binary.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cli; // the program as a user types it
mod data; // fetch, sample, hub cache
mod engine; // cache decisions, workers, faults
mod hub; // the shipped pipelines on real models and data
mod learn; // parity with PyTorch and PEFT
mod plans; // good and bad pipelines
mod text; // templates and tokenization
mod tidy; // the rules of the house
mod training; // trainer and kinds around it
