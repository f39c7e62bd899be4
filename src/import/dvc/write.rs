//! The pipeline file, as text with comments.

use std::fmt::Write as _;

use super::steps::{Step, Steps};
use super::template::escape;
use super::values::Values;
use crate::source::Span;
use crate::yaml::{Entry, Node, Shape};

const HEAD: [&str; 3] = [
    "Made by `flow import` from dvc.yaml. A command runs in `sh`, in a folder that holds what its",
    "step declares, and sees few variables (`flow kinds command`): declare what else it reads",
    "under `files` and `env`.",
];

/// The text of a pipeline.
pub(super) fn pipeline(name: &str, steps: &Steps, values: &Values, notes: &[String]) -> String {
    let mut out = String::new();
    for line in HEAD {
        comment(&mut out, 0, line);
    }
    for note in notes {
        comment(&mut out, 0, &format!("Not taken over: {note}"));
    }
    line(&mut out, 0, &format!("name: {}", scalar(name)));
    let params = params(steps, values);
    if !params.is_empty() {
        line(&mut out, 0, "params:");
        map(&mut out, 2, &params);
    }
    if !steps.sweep.is_empty() {
        line(&mut out, 0, "sweep:");
        line(&mut out, 2, "grid:");
        for (axis, values) in &steps.sweep {
            let values: Vec<String> = values.iter().map(inline).collect();
            pair(&mut out, 4, axis, &format!("[{}]", values.join(", ")));
        }
    }
    line(&mut out, 0, "steps:");
    for one in &steps.steps {
        step(&mut out, one);
    }
    line(&mut out, 0, "outputs:");
    for step in &steps.steps {
        for (port, _) in &step.outputs {
            let name = match step.outputs.len() {
                1 => step.name.clone(),
                _ => format!("{}.{port}", step.name),
            };
            let reference = format!("${{steps.{}.{port}}}", step.name);
            pair(&mut out, 2, &name, &scalar(&reference));
        }
    }
    out
}

fn step(out: &mut String, step: &Step) {
    for note in &step.notes {
        note.lines().for_each(|text| comment(out, 2, text));
    }
    if let Some(stage) = &step.stage {
        comment(out, 2, &format!("DVC's `{stage}`"));
    }
    pair(out, 2, &step.name, "");
    line(out, 4, "kind: command");
    if !step.env.is_empty() {
        line(
            out,
            4,
            &format!(
                "env: [{}]",
                step.env.iter().map(|n| scalar(n)).collect::<Vec<_>>().join(", ")
            ),
        );
    }
    line(out, 4, "with:");
    match block(&step.run) {
        Some(text) => {
            line(out, 6, "run: |");
            text.lines().for_each(|text| line(out, 8, text));
        }
        None => line(out, 6, &format!("run: {}", scalar(&step.run))),
    }
    line(out, 6, "in_place: true");
    for (field, pairs) in
        [("inputs", &step.inputs), ("files", &step.files), ("outputs", &step.outputs)]
    {
        if !pairs.is_empty() {
            line(out, 6, &format!("{field}:"));
        }
        for (key, value) in pairs {
            pair(out, 8, key, &scalar(value));
        }
    }
}

fn line(out: &mut String, indent: usize, text: &str) {
    let _ = writeln!(out, "{:indent$}{text}", "");
}

/// A key with its value; without one, what follows is.
fn pair(out: &mut String, indent: usize, key: &str, value: &str) {
    // Longer ones have to say that they are keys.
    const SIMPLE_KEY: usize = 1024;
    let key = scalar(key);
    if key.len() < SIMPLE_KEY {
        return line(out, indent, format!("{key}: {value}").trim_end());
    }
    line(out, indent, &format!("? {key}"));
    line(out, indent, format!(": {value}").trim_end());
}

fn comment(out: &mut String, indent: usize, text: &str) {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    line(out, indent, format!("# {text}").trim_end());
}

/// The parameters that steps refer to, as a tree.
fn params(steps: &Steps, values: &Values) -> Vec<Entry> {
    let mut tree: Vec<Entry> = Vec::new();
    for path in &steps.params {
        let Some(mut value) = values.param(path) else { continue };
        if let Shape::Text(text) = &mut value.shape {
            *text = escape(text);
        }
        let mut entries = &mut tree;
        let names: Vec<&str> = path.split('.').collect();
        for (i, name) in names.iter().enumerate() {
            let at = entries.iter().position(|e| e.key == *name).unwrap_or_else(|| {
                let empty = Node::new(Shape::Map(Vec::new()), Span::default());
                let key_span = Span::default();
                entries.push(Entry { key: (*name).to_owned(), key_span, value: empty });
                entries.len() - 1
            });
            if i + 1 == names.len() {
                entries[at].value = value;
                break;
            }
            match &mut entries[at].value.shape {
                Shape::Map(inner) => entries = inner,
                _ => break,
            }
        }
    }
    tree
}

fn map(out: &mut String, indent: usize, entries: &[Entry]) {
    for entry in entries {
        match &entry.value.shape {
            Shape::Map(inner) if !inner.is_empty() => {
                pair(out, indent, &entry.key, "");
                map(out, indent + 2, inner);
            }
            _ => pair(out, indent, &entry.key, &inline(&entry.value)),
        }
    }
}

fn inline(node: &Node) -> String {
    match &node.shape {
        Shape::Text(text) => scalar(text),
        _ => node.to_value().to_string(),
    }
}

/// A text as a YAML scalar: plain where nothing else could be meant.
fn scalar(text: &str) -> String {
    let first = text.chars().next();
    let plain = |c: char| c.is_ascii_alphanumeric() || " _-./,+=@%>|*()".contains(c);
    let words = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    let fits = first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_' || c == '/')
        && text.chars().all(plain)
        && !text.ends_with(' ')
        && !text.contains(',')
        && !words.contains(&text.to_ascii_lowercase().as_str());
    if fits {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\u{2028}' | '\u{2029}' | '\u{feff}' => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out + "\""
}

/// A text that can stand as a block: several lines, all of them plain.
fn block(text: &str) -> Option<&str> {
    let plain = |line: &str| {
        !line.starts_with([' ', '\t'])
            && !line.ends_with([' ', '\t'])
            && !line.is_empty()
            && line.chars().all(|c| !c.is_control() && !"\u{2028}\u{2029}\u{feff}".contains(c))
    };
    (text.ends_with('\n') && text.lines().count() > 1 && text.lines().all(plain)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;
    use crate::yaml::parse;

    #[test]
    fn scalars_read_back() {
        for text in [
            "",
            "a",
            "yes",
            "No",
            "1",
            "1e-4",
            "-x",
            "a: b",
            "a #b",
            "é \u{85}\u{2028}\u{7}",
            "a\nb",
            "\"'\\",
            "${x}",
            "{a}",
            "[",
            "*a",
            "&a",
            "!x",
            "a ",
            " a",
            "%",
            "@x",
            "`",
            "a,b",
            "~",
            "a >b",
            "a\r",
            "\t",
            "_",
            "null",
            "0x1f",
            ".5",
            "? a",
            "- a",
            "\u{feff}x",
            "\0",
            &"/ȑ".repeat(600),
        ] {
            let mut yaml = format!("k: [{}]\n", scalar(text));
            pair(&mut yaml, 0, &format!("{text}key"), "1");
            let node = parse(&Source::new("t", yaml.as_str()));
            let node = node.unwrap_or_else(|d| panic!("{yaml:?}: {d:?}"));
            assert_eq!(
                node.get("k").unwrap().as_list().unwrap()[0].as_text(),
                Some(text),
                "{yaml}"
            );
            assert!(node.get(&format!("{text}key")).is_some(), "{yaml}");
        }
    }
}
