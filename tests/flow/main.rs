//! The one integration-test binary.

mod data; // fetch, sample, hub cache
mod engine; // cache decisions, workers, faults
mod learn; // parity with PyTorch and PEFT
mod plans; // good and bad pipelines
mod text; // templates and tokenization
mod tidy; // the rules of the house
mod training; // trainer and kinds around it
