//! `flow`: a declarative runner for fine-tuning experiments.
//!
//! A step is a struct. Its fields are its parameters; a field of type `Input<A>` is an edge; its
//! serialised form, with each edge replaced by the content digest of what flows along it, is its
//! cache key; and the record of having run it is its lineage.
//!
//! # The house
//! A floor imports only floors below it; rooms on one floor do not see each other.
//! `tests/flow/tidy.rs` holds the rule.
//!
//! | floor | modules | what they do |
//! |---|---|---|
//! | 7 roof | `cli`, `main.rs` | arguments, colours, exit codes; reads the environment, prints |
//! | 6 windows | `import` | pipelines of other tools, made into pipelines of this one |
//! | 5 engine | `engine` | Plan in, Run out: scheduler, cache decision, workers, events |
//! | 4 rooms | `pipeline`, `kinds` | YAML to Pipeline to Plan; one file per step kind |
//! | 3 contract | `step` | all that floors 4 and 5 agree on |
//! | 2 rooms | `artifact`, `lineage` | typed views of stored trees; records, runs, the lock |
//! | 2 rooms | `hub`, `data`, `text` | hub client; readers and samplers; templates, tokenizers |
//! | 2 rooms | `learn` | tensors and training: operations, models, LoRA, NF4, the trainer |
//! | 1 cellar | `store` | content-addressed objects, atomic publish, leases |
//! | 0 ground | `digest`, `source`, `yaml` | hashes, spans and diagnostics, the spanned YAML tree |

pub mod artifact;
pub mod cli;
pub mod data;
pub mod digest;
pub mod engine;
pub mod hub;
pub mod import;
pub mod kinds;
pub mod learn;
pub mod lineage;
pub mod pipeline;
pub mod source;
pub mod step;
pub mod store;
pub mod text;
pub mod yaml;

pub use cli::main;
