//! Which files make up which split: from the card's `configs`, else from the files' names.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::{Card, Config, Format};
use crate::source::{Fault, suggest};

/// Words that name a split when they stand alone in a path (`data/train-00000.parquet`).
const WORDS: &[(&str, &[&str])] = &[
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Files by split of a config (the default one if none is named), and the config's name.
/// `paths` are all files of the repository.
///
/// # Errors
/// When there is no such config, a pattern matches nothing, or there is no data at all.
pub fn of_config(
    card: &Card,
    paths: &[&str],
    config: Option<&str>,
) -> Result<(String, BTreeMap<String, Vec<String>>)> {
    let names: Vec<&str> = card.configs.iter().map(|c| c.name.as_str()).collect();
    let chosen = match config {
        Some(name) => {
            let found = card.configs.iter().find(|c| c.name == name);
            if found.is_none() && !(names.is_empty() && name == "default") {
                let message = format!("the dataset has no config `{name}`");
                let help = suggest(name, &names)
                    .unwrap_or_else(|| "its card names none: leave `config` out".into());
                return Err(Fault::new(message).help(help).into());
            }
            found
        }
        None => default_config(&card.configs)?,
    };
    let Some(config) = chosen else {
        return Ok(("default".to_owned(), of_names(paths)?));
    };
    let below = |path: &str| match &config.data_dir {
        Some(dir) => path.strip_prefix(dir.trim_matches('/')).is_some_and(|r| r.starts_with('/')),
        None => true,
    };
    if config.data_files.is_empty() {
        let paths: Vec<&str> = paths.iter().copied().filter(|p| below(p)).collect();
        return Ok((config.name.clone(), of_names(&paths)?));
    }
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (split, patterns) in &config.data_files {
        let files = splits.entry(split.clone()).or_default();
        for pattern in patterns {
            let within = match &config.data_dir {
                Some(dir) => format!("{}/{pattern}", dir.trim_matches('/')),
                None => pattern.clone(),
            };
            let matches = |p: &&str| glob_match(&within, p) || glob_match(pattern, p);
            let found = paths.iter().copied().filter(matches);
            let found: Vec<String> = found.filter(|p| is_data(p)).map(str::to_owned).collect();
            if found.is_empty() {
                bail!("the card's pattern `{pattern}` of split `{split}` matches no data file");
            }
            files.extend(found);
        }
        files.sort_unstable();
        files.dedup();
    }
    Ok((config.name.clone(), splits))
}

fn default_config(configs: &[Config]) -> Result<Option<&Config>> {
    let marked = configs.iter().find(|c| c.default);
    if let Some(config) = marked.or_else(|| configs.iter().find(|c| c.name == "default")) {
        return Ok(Some(config));
    }
    match configs {
        [] => Ok(None),
        [only] => Ok(Some(only)),
        several => {
            let names: Vec<String> = several.iter().map(|c| format!("`{}`", c.name)).collect();
            let fault = Fault::new("the dataset has several configs and none is the default");
            Err(fault.help(format!("set `config` to one of {}", names.join(", "))).into())
        }
    }
}

/// Whether a file of a repository may hold rows.
fn is_data(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let notes = ["dataset_infos.json", "dataset_dict.json", "state.json", "dataset_info.json"];
    let hidden = path.split('/').any(|part| part.starts_with(['.', '_']));
    Format::of_name(path).is_some() && !hidden && !notes.contains(&name)
}

/// Files by split from their names: the word `train`, `test`, `validation` (also `valid`, `val`,
/// `dev`) standing alone in the file's name or, failing that, in a folder's; without any such
/// word all files are `train`. Of several formats the one with the most files is taken.
///
/// # Errors
/// When no file holds rows.
pub fn of_names(paths: &[&str]) -> Result<BTreeMap<String, Vec<String>>> {
    let mut by_format: BTreeMap<Format, Vec<&str>> = BTreeMap::new();
    for path in paths.iter().copied().filter(|p| is_data(p)) {
        if let Some((format, _)) = Format::of_name(path) {
            by_format.entry(format).or_default().push(path);
        }
    }
    // `max_by_key` keeps the last of equals, and the formats stand from most to least telling.
    let most = by_format.into_iter().rev().max_by_key(|(_, files)| files.len());
    let Some((_, files)) = most else {
        return Err(Fault::new("there is no file with rows among them")
            .help("known are .parquet, .jsonl, .json, .csv, .tsv and .txt, each also .gz or .zst")
            .into());
    };
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let any = files.iter().any(|f| split_of(f).is_some());
    for file in files {
        // Beside named splits, a file without a name is something else (a dump, a sample).
        let split = if any { split_of(file) } else { Some("train") };
        if let Some(split) = split {
            splits.entry(split.to_owned()).or_default().push(file.to_owned());
        }
    }
    splits.values_mut().for_each(|files| files.sort_unstable());
    Ok(splits)
}

fn split_of(path: &str) -> Option<&'static str> {
    path.rsplit('/')
        .find_map(|part| {
            let part = part.to_ascii_lowercase();
            let mut words = part.split(|c: char| !c.is_ascii_alphabetic());
            words.find_map(|word| WORDS.iter().find(|(_, known)| known.contains(&word)))
        })
        .map(|(split, _)| *split)
}

/// Whether a path matches a pattern: `*` and `?` stay within a folder, `**` does not, `[abc]`,
/// `[a-z]` and `[!a]` stand for a character.
pub fn glob_match(pattern: &str, path: &str) -> bool {
    let pattern: Vec<char> = pattern.trim_start_matches("./").chars().collect();
    let path: Vec<char> = path.chars().collect();
    matches(&pattern, &path)
}

fn matches(pattern: &[char], path: &[char]) -> bool {
    match pattern {
        [] => path.is_empty(),
        ['*', '*', '/', rest @ ..] => {
            let starts = path.iter().enumerate().filter(|(_, c)| **c == '/').map(|(i, _)| i + 1);
            std::iter::once(0).chain(starts).any(|i| matches(rest, &path[i..]))
        }
        ['*', '*', rest @ ..] => (0..=path.len()).any(|i| matches(rest, &path[i..])),
        ['*', rest @ ..] => {
            let end = path.iter().position(|c| *c == '/').unwrap_or(path.len());
            (0..=end).any(|i| matches(rest, &path[i..]))
        }
        ['?', rest @ ..] => {
            matches!(path, [c, tail @ ..] if *c != '/' && matches(rest, tail))
        }
        ['[', set @ ..] if set.iter().skip(1).any(|c| *c == ']') => {
            let (not, set) = match set {
                ['!' | '^', set @ ..] => (true, set),
                set => (false, set),
            };
            let Some(end) = set.iter().skip(1).position(|c| *c == ']').map(|i| i + 1) else {
                return false;
            };
            let [c, tail @ ..] = path else {
                return false;
            };
            in_set(&set[..end], *c) != not && *c != '/' && matches(&set[end + 1..], tail)
        }
        [p, rest @ ..] => matches!(path, [c, tail @ ..] if c == p && matches(rest, tail)),
    }
}

fn in_set(set: &[char], c: char) -> bool {
    match set {
        [low, '-', high, rest @ ..] => (*low <= c && c <= *high) || in_set(rest, c),
        [one, rest @ ..] => *one == c || in_set(rest, c),
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_as_fsspec_has_them() {
        for (pattern, path, want) in [
            ("plain_text/train-*", "plain_text/train-00000-of-00001.parquet", true),
            ("train-*", "plain_text/train-0.parquet", false),
            ("*.csv", "a/b.csv", false),
            ("**/*.csv", "a/b.csv", true),
            ("**/*.csv", "b.csv", true),
            ("**", "a/b/c", true),
            ("data/?.txt", "data/a.txt", true),
            ("data/?.txt", "data/ab.txt", false),
            ("d[a-c]/x", "db/x", true),
            ("d[!a-c]/x", "db/x", false),
            ("./a.csv", "a.csv", true),
            ("a.csv", "a.csvx", false),
        ] {
            assert_eq!(glob_match(pattern, path), want, "{pattern} {path}");
        }
    }

    #[test]
    fn names_of_files_say_the_split() {
        let splits = of_names(&[
            "README.md",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/dev.parquet",
            "test/part.parquet",
            "data/latest.parquet",
            "dataset_infos.json",
        ])
        .unwrap();
        let names: Vec<&str> = splits.keys().map(String::as_str).collect();
        assert_eq!(names, ["test", "train", "validation"]);
        assert_eq!(
            splits["train"],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        );
        let one = of_names(&["alpaca_data.json", "LICENSE"]).unwrap();
        assert_eq!(one["train"], ["alpaca_data.json"]);
        assert!(of_names(&["README.md", "script.py"]).is_err());
    }

    #[test]
    fn configs_choose_files() {
        let files = |files: &[(&str, &str)]| -> super::super::DataFiles {
            files.iter().map(|(s, p)| ((*s).into(), vec![(*p).into()])).collect()
        };
        let config = |name: &str, default, data_files| Config {
            name: name.into(),
            default,
            data_files,
            data_dir: None,
        };
        let paths = ["a/x.csv", "a/y.csv", "b/z.csv"];
        let mut card = Card::default();
        card.configs = vec![
            config("a", false, files(&[("train", "a/x*"), ("test", "a/y*")])),
            config("b", true, files(&[("train", "b/*")])),
        ];
        let (name, splits) = of_config(&card, &paths, None).unwrap();
        assert_eq!((name.as_str(), splits["train"][0].as_str()), ("b", "b/z.csv"));
        let (_, splits) = of_config(&card, &paths, Some("a")).unwrap();
        assert_eq!(splits["test"], ["a/y.csv"]);
        let e = of_config(&card, &paths, Some("aa")).unwrap_err();
        assert!(crate::source::advice(&e)[0].contains("`a`"), "{e}");
        card.configs = vec![config("a", false, files(&[("train", "c/*")]))];
        let e = of_config(&card, &paths, None).unwrap_err().to_string();
        assert!(e.contains("`c/*`"), "{e}");
    }
}
