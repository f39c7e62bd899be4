//! Text to a checked plan, with the real kinds: everything wrong is a diagnostic.

#![no_main]

use std::path::Path;

use flow::pipeline::{Plan, Settings};
use flow::source::Source;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let source = Source::new("p.yaml", text);
    match Plan::new(Path::new("p.yaml"), source.clone(), flow::kinds::ALL, &Settings::default()) {
        Ok(plan) => {
            assert_eq!(plan.order().len(), plan.graph.node_count());
            for diagnostic in &plan.warnings {
                let _ = &text[diagnostic.span.start..diagnostic.span.end];
            }
        }
        Err(diagnostics) => {
            assert!(!diagnostics.is_empty(), "refused without a reason");
            for diagnostic in &diagnostics {
                let _ = &text[diagnostic.span.start..diagnostic.span.end];
                source.position(diagnostic.span.start);
            }
        }
    }
});
