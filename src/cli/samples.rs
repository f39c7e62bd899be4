//! The first rows of prompts and of tokens as people read them: what is asked and what is learnt,
//! told apart.

use serde_json::Value;

/// The rows of a `samples.json`, in lines; `None` if it is none.
pub(super) fn readable(text: &str) -> Option<String> {
    let rows: Vec<Value> = serde_json::from_str(text).ok()?;
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        out.push_str(&format!("row {number}\n"));
        let label = &row["label"];
        if let Some(segments) = row["segments"].as_array() {
            for segment in segments {
                part(&mut out, segment["kind"].as_str()?, segment["text"].as_str()?);
            }
        } else if let Some(tokens) = row["tokens"].as_array() {
            let tokens = tokens.iter().map(Value::as_str).collect::<Option<Vec<&str>>>()?;
            let learnt = row["target"].as_array()?;
            let learnt: Vec<Option<bool>> =
                (0..tokens.len()).map(|at| learnt.get(at).and_then(Value::as_bool)).collect();
            let runs = learnt.chunk_by(|a, b| a == b);
            let mut from = 0;
            for run in runs {
                let name = match run[0] {
                    Some(true) => "target",
                    Some(false) => "masked",
                    None => "tokens",
                };
                part(&mut out, name, &tokens[from..from + run.len()].join(" "));
                from += run.len();
            }
        } else {
            for name in ["text", "text_pair"] {
                row[name].as_str().into_iter().for_each(|text| part(&mut out, name, text));
            }
        }
        if !label.is_null() {
            part(&mut out, "label", &label.to_string());
        }
    }
    Some(out)
}

/// A part under its name; its own lines stand below each other.
fn part(out: &mut String, name: &str, text: &str) {
    for (at, line) in text.split('\n').enumerate() {
        let name = if at == 0 { name } else { "" };
        out.push_str(format!("  {name:<9} {line}").trim_end());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_seen() {
        let text = r#"[
            { "segments": [
                { "kind": "template", "text": "Q:\nGood?" }, { "kind": "target", "text": "yes" }
            ], "label": 1 },
            { "tokens": ["<s>", "Q", "yes", "</s>"], "target": [false, false, true, true] },
            { "tokens": ["a", "b"], "target": [], "label": 0 },
            { "text": "one", "text_pair": "two", "label": 0 }
        ]"#;
        insta::assert_snapshot!(readable(text).unwrap(), @r"
        row 0
          template  Q:
                    Good?
          target    yes
          label     1
        row 1
          masked    <s> Q
          target    yes </s>
        row 2
          tokens    a b
          label     0
        row 3
          text      one
          text_pair two
          label     0
        ");
        assert_eq!(readable("{}"), None);
    }
}
