//! What a dataset's card (`README.md`) says at its head, in YAML: `configs` and `dataset_info`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Patterns by split, in the card's order.
pub type DataFiles = Vec<(String, Vec<String>)>;

/// Class names by column.
type Classes = BTreeMap<String, Vec<String>>;

/// One of the card's `configs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `config_name`.
    pub name: String,
    /// Taken when none is named.
    pub default: bool,
    /// `data_files`: path patterns by split; empty if the card does not say.
    pub data_files: DataFiles,
    /// `data_dir`: files lie below this folder.
    pub data_dir: Option<String>,
}

/// The head of a card.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Card {
    /// In the card's order; empty if there are none.
    pub configs: Vec<Config>,
    /// Each `dataset_info`: the config that it names, and class names by column.
    classes: Vec<(Option<String>, Classes)>,
}

impl Card {
    /// Reads the head of a card; a card without one says nothing.
    ///
    /// # Errors
    /// When the head is not YAML.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.trim_start_matches('\u{feff}');
        let Some(rest) = text.strip_prefix("---").map(|r| r.trim_start_matches('\r')) else {
            return Ok(Self::default());
        };
        let mut head = String::new();
        for line in rest.lines().skip(1) {
            if line.trim_end() == "---" {
                let value: Value = serde_yaml::from_str_with_options(&head, options())
                    .context("the head of the dataset's card is not YAML")?;
                return Ok(Self::of_value(&value));
            }
            head.push_str(line);
            head.push('\n');
        }
        Ok(Self::default())
    }

    fn of_value(head: &Value) -> Self {
        let configs = head["configs"].as_array().into_iter().flatten();
        let configs = configs.filter_map(|c| {
            Some(Config {
                name: text(&c["config_name"])?,
                default: c["default"].as_bool().unwrap_or(false),
                data_files: data_files(&c["data_files"]),
                data_dir: text(&c["data_dir"]),
            })
        });
        let infos = match &head["dataset_info"] {
            Value::Array(infos) => infos.as_slice(),
            one => std::slice::from_ref(one),
        };
        let classes = infos.iter().map(|info| {
            let config = text(&info["config_name"]);
            let features = info["features"].as_array().into_iter().flatten();
            let named = features.filter_map(|f| {
                let names = names(&f["dtype"]["class_label"]["names"])?;
                Some((text(&f["name"])?, names))
            });
            (config, named.collect())
        });
        Self { configs: configs.collect(), classes: classes.collect() }
    }

    /// Class names by column of a config.
    pub fn classes(&self, config: &str) -> Classes {
        let named = self.classes.iter().find(|(name, _)| name.as_deref() == Some(config));
        // The only one speaks of this config unless it names another of several.
        let only = match self.classes.as_slice() {
            [only] if only.0.is_none() || self.configs.len() <= 1 => Some(only),
            _ => None,
        };
        named.or(only).map(|(_, classes)| classes.clone()).unwrap_or_default()
    }
}

/// As in a pipeline: a class that is named `no` or `007` keeps its name.
fn options() -> serde_yaml::Options {
    let mut options = serde_yaml::Options::default();
    options.strict_booleans = true;
    options.leading_zero_numbers_as_strings = true;
    options
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

/// A pattern or a list of patterns.
fn patterns(value: &Value) -> Vec<String> {
    match value {
        Value::Array(items) => items.iter().filter_map(text).collect(),
        one => text(one).into_iter().collect(),
    }
}

/// The forms of `data_files`: one pattern or a list of them (all `train`), a map from split to
/// patterns, a list of `{split, path}`.
fn data_files(value: &Value) -> DataFiles {
    match value {
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), patterns(v))).collect(),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            let items = items.iter();
            items.filter_map(|i| Some((text(&i["split"])?, patterns(&i["path"])))).collect()
        }
        Value::Null => Vec::new(),
        other => vec![("train".to_owned(), patterns(other))],
    }
}

/// Class names as a list, or as a map from number to name that leaves none out.
pub(super) fn names(value: &Value) -> Option<Vec<String>> {
    let names: Vec<String> = match value {
        Value::Array(items) => items.iter().map(text).collect::<Option<_>>()?,
        Value::Object(map) => {
            (0..map.len()).map(|i| text(map.get(&i.to_string())?)).collect::<Option<_>>()?
        }
        _ => return None,
    };
    (!names.is_empty()).then_some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARD: &str = r"---
license: mit
dataset_info:
- config_name: plain_text
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
configs:
- config_name: plain_text
  default: true
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: [a.csv, b.csv]
- config_name: other
  data_files: o/*.csv
  data_dir: o
---
# Title
---
x: [
";

    #[test]
    fn a_card_says_configs_and_classes() {
        let card = Card::parse(CARD).unwrap();
        assert_eq!(card.configs.len(), 2);
        assert!(card.configs[0].default && !card.configs[1].default);
        assert_eq!(card.configs[0].data_files[0].1, ["plain_text/train-*"]);
        assert_eq!(
            card.configs[0].data_files[1],
            ("test".into(), vec!["a.csv".into(), "b.csv".into()])
        );
        assert_eq!(card.configs[1].data_files, [("train".into(), vec!["o/*.csv".into()])]);
        assert_eq!(card.configs[1].data_dir.as_deref(), Some("o"));
        assert_eq!(card.classes("plain_text")["label"], ["neg", "pos"]);
    }

    #[test]
    fn words_of_yaml_are_class_names() {
        let head = "dataset_info:\n  features:\n  - name: answer\n    dtype:\n      \
                    class_label:\n        names:\n          '0': no\n          '1': yes\n";
        let card = Card::parse(&format!("---\n{head}---\n")).unwrap();
        assert_eq!(card.classes("default")["answer"], ["no", "yes"]);
    }

    #[test]
    fn class_names_belong_to_their_config() {
        let card = Card::parse(CARD).unwrap();
        assert!(card.classes("other").is_empty());
        let unnamed = Card::parse(&CARD.replacen("config_name: plain_text", "x: y", 1)).unwrap();
        assert_eq!(unnamed.classes("other")["label"], ["neg", "pos"]);
    }

    #[test]
    fn names_must_leave_no_number_out() {
        assert_eq!(names(&serde_json::json!(["a", "b"])).unwrap(), ["a", "b"]);
        assert_eq!(names(&serde_json::json!({"0": "a", "2": "b"})), None);
        let eleven: serde_json::Map<String, Value> =
            (0..11).map(|i| (i.to_string(), Value::from(format!("n{i}")))).collect();
        assert_eq!(names(&Value::Object(eleven)).unwrap()[10], "n10");
    }

    #[test]
    fn a_card_may_say_nothing() {
        assert_eq!(Card::parse("# Title").unwrap(), Card::default());
        assert_eq!(Card::parse("---\nnot closed").unwrap(), Card::default());
        assert!(Card::parse("---\na: [1\n---\n").is_err());
    }
}
