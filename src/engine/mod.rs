//! Plan in, Run out.
