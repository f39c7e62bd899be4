//! Templates and tokenization: from a row's columns to prompt and target pieces, and from those
//! to token ids with labels on the target only.
//!
//! What is learnt is known by construction: a template gives pieces, each of one [`Part`], and
//! labels follow the pieces; nothing is ever searched for among tokens.

mod chat;
mod chunk;
mod classify;
mod columns;
mod conversation;
mod encode;
mod fast;
mod fit;
mod json;
mod labels;
mod pack;
mod pattern;
mod piece;
mod prompts;
mod render;
mod template;
mod tokenizer;
mod tokens;
mod train_tokenizer;

pub use chat::{ChatTemplate, Message, Turns};
pub use columns::{Columns, distinct, schema, texts};
pub use conversation::{Conversation, Tags, known_roles, tools};
pub use encode::{Encoded, Encoder, Limits, Pair, Row, TooLong, Truncate};
pub use json::parse;
pub use labels::{Classes, LabelWords};
pub use pattern::Pattern;
pub use piece::{Part, Piece};
pub use prompts::{Fields, Formatter, Rendered, Target};
pub use render::{OnRefused, RenderedFile, render_file};
pub use template::{Template, Wording};
pub use tokenizer::{Tokenizer, TokenizerSource};
pub use tokens::{Chunks, Keep, Task, Tokenized, tokenize_file};
pub use train_tokenizer::{Algorithm, TokenizerSpec, train_tokenizer};

/// File names and the writer's name are fixed, so that equal rows give equal bytes.
const CREATED_BY: &str = "flow";
