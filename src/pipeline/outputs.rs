//! What is published under `outputs/`.

use std::fmt::Write as _;

use petgraph::graph::NodeIndex;

use super::check::{Names, unknown_step};
use super::instance::Made;
use super::plan::{Output, Point, StepId};
use super::reference::{Piece, Reference, near, pieces};
use crate::digest::Digest;
use crate::source::Diagnostic;
use crate::yaml::Entry;

/// An output before the graph is there.
pub(super) struct Wanted {
    name: String,
    step: usize,
    instance: usize,
    port: Option<String>,
}

impl Wanted {
    /// The output, once its instance has a node.
    pub(super) fn at(self, nodes: &[Vec<NodeIndex>]) -> Option<Output> {
        let node = *nodes.get(self.step)?.get(self.instance)?;
        Some(Output { name: self.name, node, port: self.port })
    }
}

/// Checks `outputs:`.
pub(super) fn read(
    entries: &[Entry],
    names: &Names<'_>,
    made: &[Vec<Made>],
    found: &mut Vec<Diagnostic>,
) -> Vec<Wanted> {
    let mut wanted = Vec::new();
    for entry in entries {
        let fits = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
        if entry.key.is_empty() || entry.key.starts_with('.') || !entry.key.chars().all(fits) {
            let message = format!("`{}` cannot be the name of an output", entry.key);
            let help = "an output is a folder: use letters, digits, `_`, `-` and `.`";
            found.push(Diagnostic::error(entry.key_span, message, "not a name").help(help));
            continue;
        }
        let help = "an output is a reference, like `${steps.train}` or `${steps.train.adapter}`";
        let node = &entry.value;
        let (reference, span) = match pieces(node, names.source).as_deref() {
            Ok([Piece::Ref(reference, span)]) => (reference.clone(), *span),
            Ok(_) => {
                let message = format!("expected a reference to a step, found {}", node.describe());
                found.push(Diagnostic::error(node.span, message, "not a reference").help(help));
                continue;
            }
            Err(wrong) => {
                found.extend(wrong.iter().cloned());
                continue;
            }
        };
        let (step, port) = match reference {
            Reference::Step { step, port } => (step, port),
            Reference::Gather { step } => {
                let message = "an output cannot be a gather";
                let help = format!("write `${{steps.{step}}}`: every point of it is published");
                found.push(Diagnostic::error(span, message, "a gather").help(help));
                continue;
            }
            _ => {
                let message = "an output is made by a step";
                found.push(Diagnostic::error(span, message, "not a step").help(help));
                continue;
            }
        };
        let Some(&index) = names.index.get(step.as_str()) else {
            found.push(unknown_step(&step, span, &names.index));
            continue;
        };
        let several = made[index].len() > 1;
        let mut refused = false;
        for (instance, one) in made[index].iter().enumerate() {
            let known = one.ports.as_ref().and_then(|p| p.names.as_ref());
            let lacking = port.as_ref().zip(known).filter(|(port, known)| !known.contains(port));
            if let Some((port, known)) = lacking {
                if !std::mem::replace(&mut refused, true) {
                    let message = format!("step `{step}` has no port `{port}`");
                    let wrong = Diagnostic::error(span, message, "no such port");
                    let help = near(port, known.iter().map(String::as_str));
                    found.push(wrong.maybe_help(help));
                }
                continue;
            }
            let name = if several { at_point(&entry.key, &one.point) } else { entry.key.clone() };
            let name = bounded(name);
            wanted.push(Wanted { name, step: index, instance, port: port.clone() });
        }
    }
    wanted
}

/// Bytes of a folder's name; file systems take 255, and some are needed around it.
const LONGEST: usize = 120;

/// A name that every file system takes: a long one is cut, and a digest keeps such names apart.
fn bounded(name: String) -> String {
    if name.len() <= LONGEST {
        return name;
    }
    let digest = Digest::of(name.as_bytes()).short();
    let mut end = LONGEST - digest.len() - 1;
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{digest}", &name[..end])
}

/// `name@lora.r=8`, as the name of one folder: what a file name cannot hold is percent-encoded.
fn at_point(name: &str, point: &Point) -> String {
    let mut out = String::new();
    for c in StepId::new(name, point).0.chars() {
        if matches!(c, '/' | '\\' | '%') || c.is_control() {
            let mut bytes = [0; 4];
            for byte in c.encode_utf8(&mut bytes).bytes() {
                let _ = write!(out, "%{byte:02X}");
            }
        } else {
            out.push(c);
        }
    }
    out
}
