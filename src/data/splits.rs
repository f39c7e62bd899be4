//! Which files make up which split: from the card's `configs`, else from the files' names.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::{Card, Config, Format, is_archive};
use crate::source::{Fault, suggest};

/// Words that name a split when they stand alone in a path (`data/train-00000.parquet`).
const WORDS: &[(&str, &[&str])] = &[
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Files by split.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Files of each split, sorted.
    pub splits: BTreeMap<String, Vec<String>>,
    /// Files that may hold rows and are in no split.
    pub left_out: Vec<String>,
}

/// Whether a text can be the name of a split: words of letters, digits, `_` and `-`, with dots
/// between them (the `datasets` library has `\w+(\.\w+)*`).
pub fn is_split_name(name: &str) -> bool {
    let plain = |c: char| c.is_alphanumeric() || "_-".contains(c);
    name.split('.').all(|word| !word.is_empty() && word.chars().all(plain))
}

/// Files by split of a config (the default one if none is named), and the config's name.
/// `paths` are all files of the repository.
///
/// # Errors
/// When there is no such config, the card names a split as none can be named, a pattern matches
/// nothing, or there is no data at all.
pub fn of_config(card: &Card, paths: &[&str], config: Option<&str>) -> Result<(String, Found)> {
    let names: Vec<&str> = card.configs.iter().map(|c| c.name.as_str()).collect();
    let chosen = match config {
        Some(name) => {
            let found = card.configs.iter().find(|c| c.name == name);
            let converted = names.is_empty() && paths.iter().any(|p| converted(p).is_some());
            if found.is_none() && !(names.is_empty() && name == "default") && !converted {
                let message = format!("the dataset has no config `{name}`");
                let help = suggest(name, &names)
                    .unwrap_or_else(|| "its card names none: leave `config` out".into());
                return Err(Fault::new(message).help(help).into());
            }
            found
        }
        None => default_config(&card.configs)?,
    };
    if let (None, Some(found)) = (chosen, of_converted(paths, config)?) {
        return Ok(found);
    }
    let Some(config) = chosen else {
        return Ok(("default".to_owned(), of_names(paths)?));
    };
    let below = |path: &str| match &config.data_dir {
        Some(dir) => {
            let dir = dir.trim_start_matches("./").trim_matches('/');
            path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
        }
        None => true,
    };
    if config.data_files.is_empty() {
        let paths: Vec<&str> = paths.iter().copied().filter(|p| below(p)).collect();
        return Ok((config.name.clone(), of_names(&paths)?));
    }
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (split, patterns) in &config.data_files {
        if !is_split_name(split) {
            let message = format!("the card names a split `{split}`, which cannot be a name");
            let help = "letters, digits, `_`, `-`, and `.` between them";
            return Err(Fault::new(message).help(help).into());
        }
        let files = splits.entry(split.clone()).or_default();
        for pattern in patterns {
            let pattern = match &config.data_dir {
                Some(dir) => {
                    let within = pattern.trim_start_matches("./");
                    format!("{}/{within}", dir.trim_start_matches("./").trim_matches('/'))
                }
                None => pattern.clone(),
            };
            let found = paths.iter().copied().filter(|p| glob_match(&pattern, p));
            let found: Vec<String> = found.filter(|p| is_data(p)).map(str::to_owned).collect();
            if found.is_empty() {
                bail!("the card's pattern `{pattern}` of split `{split}` matches no data file");
            }
            files.extend(found);
        }
        files.sort_unstable();
        files.dedup();
    }
    Ok((config.name.clone(), Found { splits, left_out: Vec::new() }))
}

/// Config and split of a file that the hub has converted: `plain_text/train/0000.parquet`, and
/// `partial-train` where it has stopped early.
fn converted(path: &str) -> Option<(&str, &str)> {
    let mut parts = path.split('/');
    let (config, split, name) = (parts.next()?, parts.next()?, parts.next()?);
    let number = name.strip_suffix(".parquet")?;
    let digits = number.len() == 4 && number.bytes().all(|b| b.is_ascii_digit());
    let split = split.strip_prefix("partial-").unwrap_or(split);
    (digits && parts.next().is_none() && is_split_name(split)).then_some((config, split))
}

/// Files by split in the branch of converted files, which has a folder for each config; `None`
/// where the files lie otherwise.
fn of_converted(paths: &[&str], config: Option<&str>) -> Result<Option<(String, Found)>> {
    let data: Vec<&str> = paths.iter().copied().filter(|p| is_data(p)).collect();
    let mut configs: BTreeMap<&str, Found> = BTreeMap::new();
    for path in &data {
        let Some((config, split)) = converted(path) else { return Ok(None) };
        let splits = &mut configs.entry(config).or_default().splits;
        splits.entry(split.to_owned()).or_default().push((*path).to_owned());
    }
    let names: Vec<&str> = configs.keys().copied().collect();
    let name = match (config, names.as_slice()) {
        (_, []) => return Ok(None),
        (Some(name), _) => name,
        (None, [only]) => only,
        (None, names) if names.contains(&"default") => "default",
        (None, names) => {
            let fault = Fault::new("the dataset has several configs and none is the default");
            let help = format!("set `config` to one of `{}`", names.join("`, `"));
            return Err(fault.help(help).into());
        }
    };
    let Some(mut found) = configs.remove(name) else {
        let fault = Fault::new(format!("the dataset has no config `{name}`"));
        return Err(fault.help(suggest(name, &names).unwrap_or_default()).into());
    };
    found.splits.values_mut().for_each(|files| files.sort_unstable());
    Ok(Some((name.to_owned(), found)))
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

/// The files that may hold rows, and those that are left out although they may: plain text beside
/// structured files is a licence or a note.
pub fn with_rows<'a>(paths: &[&'a str]) -> (Vec<&'a str>, Vec<&'a str>) {
    let all = paths.iter().copied().filter(|p| is_data(p));
    let is_text = |path: &&str| matches!(Format::of_name(path), Some((Format::Text, _)));
    let (text, structured): (Vec<&str>, Vec<&str>) = all.partition(is_text);
    if structured.is_empty() { (text, structured) } else { (structured, text) }
}

/// Files by split from their names. A shard's name (`train_sft-00000-of-00004`) is taken whole in
/// a folder `data`, or where one of the words is in it; else the word `train`, `test`,
/// `validation` (also `valid`, `val`, `dev`) standing alone in the file's name or, failing that,
/// in a folder's. Without any such name all files are `train`; beside named splits, a file without
/// a name is something else (a dump, a sample) and is left out. So is plain text beside structured
/// files, and of several formats without names all but the one with the most files.
///
/// # Errors
/// When no file holds rows, or splits are named in several formats.
pub fn of_names(paths: &[&str]) -> Result<Found> {
    let (data, mut left_out) = with_rows(paths);
    let archives: Vec<&str> = paths.iter().copied().filter(|path| is_archive(path)).collect();
    let is_text = |path: &&str| matches!(Format::of_name(path), Some((Format::Text, _)));
    if !archives.is_empty() && data.iter().all(is_text) {
        let message = format!("the rows are in archives: {}", archives.join(", "));
        let help = "archives are not unpacked: unpack them, and name their files under `files`";
        return Err(Fault::new(message).help(help).into());
    }
    let mut by_format: BTreeMap<Format, Vec<&str>> = BTreeMap::new();
    for path in data {
        if let Some((format, _)) = Format::of_name(path) {
            by_format.entry(format).or_default().push(path);
        }
    }
    let named = |files: &[&str]| files.iter().any(|f| split_of(f).is_some());
    let telling: Vec<&str> =
        by_format.values().filter(|f| named(f)).filter_map(|f| f.first().copied()).collect();
    if telling.len() > 1 {
        let message = format!("splits are named in several formats: {}", telling.join(", "));
        return Err(Fault::new(message)
            .help("name the files of each split under `files`, or fetch one by `url`")
            .into());
    }
    // `max_by_key` keeps the last of equals, and the formats stand from most to least telling.
    let most = by_format.iter().rev().max_by_key(|(_, files)| (named(files), files.len()));
    let Some(format) = most.map(|(format, _)| *format) else {
        return Err(Fault::new("there is no file with rows among them")
            .help("known are .parquet, .jsonl, .json, .csv, .tsv and .txt, each also .gz or .zst")
            .into());
    };
    let files = by_format.remove(&format).unwrap_or_default();
    left_out.extend(by_format.into_values().flatten());
    let mut found = Found::default();
    let any = named(&files);
    for file in files {
        let split = if any { split_of(file) } else { Some("train") };
        match split {
            Some(split) => {
                found.splits.entry(split.to_owned()).or_default().push(file.to_owned());
            }
            None => left_out.push(file),
        }
    }
    found.splits.values_mut().for_each(|files| files.sort_unstable());
    left_out.sort_unstable();
    found.left_out = left_out.into_iter().map(str::to_owned).collect();
    Ok(found)
}

fn split_of(path: &str) -> Option<&str> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    if let Some(name) = sharded(name)
        && (folder.rsplit('/').next() == Some("data") || word_of(name).is_some())
    {
        return Some(name);
    }
    path.rsplit('/').find_map(word_of)
}

fn word_of(part: &str) -> Option<&'static str> {
    let part = part.to_ascii_lowercase();
    let mut words = part.split(|c: char| !c.is_ascii_alphabetic());
    let known = words.find_map(|word| WORDS.iter().find(|(_, known)| known.contains(&word)));
    known.map(|(split, _)| *split)
}

/// The name before `-00000-of-00001`, as `push_to_hub` writes it.
fn sharded(name: &str) -> Option<&str> {
    let (before, after) = name.rsplit_once("-of-")?;
    let (split, shard) = before.rsplit_once('-')?;
    let five = |digits: &str| digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
    let all = after.split('.').next()?;
    (five(shard) && five(all) && is_split_name(split)).then_some(split)
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
    fn archives_are_told() {
        for archives in ["train.zip", "data/train.tar.gz", "train.csv.zip", "a.TGZ", "b.tar"] {
            let e = of_names(&["README.md", "notes.txt", archives]).unwrap_err();
            assert_eq!(e.to_string(), format!("the rows are in archives: {archives}"));
        }
        assert!(of_names(&["train.csv", "images.zip"]).is_ok());
        assert!(!is_archive("train.csv.gz") && !is_archive("zip.parquet"));
    }

    #[test]
    fn names_of_files_say_the_split() {
        let found = of_names(&[
            "README.md",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/dev.parquet",
            "test/part.parquet",
            "data/latest.parquet",
            "dataset_infos.json",
        ])
        .unwrap();
        assert_eq!(found.left_out, ["data/latest.parquet"]);
        let splits = found.splits;
        let names: Vec<&str> = splits.keys().map(String::as_str).collect();
        assert_eq!(names, ["test", "train", "validation"]);
        assert_eq!(
            splits["train"],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        );
        let one = of_names(&["alpaca_data.json", "LICENSE"]).unwrap();
        assert_eq!(one.splits["train"], ["alpaca_data.json"]);
        assert!(of_names(&["README.md", "script.py"]).is_err());
    }

    #[test]
    fn names_of_shards_are_taken_whole() {
        let found = of_names(&[
            "data/train_sft-00000-of-00001.parquet",
            "data/train_gen-00000-of-00001.parquet",
            "data/en.x-00000-of-00001.parquet",
            "more/test_sft-00000-of-00001.parquet",
        ]);
        let splits = found.unwrap().splits;
        let names: Vec<&str> = splits.keys().map(String::as_str).collect();
        assert_eq!(names, ["en.x", "test_sft", "train_gen", "train_sft"]);
        let parts = of_names(&["x/part-00000-of-00002.json", "x/part-00001-of-00002.json"]);
        assert_eq!(parts.unwrap().splits["train"].len(), 2);
    }

    #[test]
    fn notes_beside_data_are_not_data() {
        let found = of_names(&["reviews.csv", "LICENSE.txt", "NOTES.txt"]).unwrap();
        assert_eq!(found.splits["train"], ["reviews.csv"]);
        assert_eq!(found.left_out, ["LICENSE.txt", "NOTES.txt"]);
        assert_eq!(of_names(&["a.txt", "b.txt"]).unwrap().splits["train"], ["a.txt", "b.txt"]);
        let e = of_names(&["train.csv", "test.jsonl"]).unwrap_err().to_string();
        assert!(e.contains("train.csv") && e.contains("test.jsonl"), "{e}");
        let found = of_names(&["test.csv", "a.json", "b.json"]).unwrap();
        assert_eq!((found.splits["test"].len(), found.left_out.len()), (1, 2));
    }

    #[test]
    fn converted_files_lie_by_config_and_split() {
        let paths = ["b/train/0001.parquet", "b/train/0000.parquet", "b/test/0000.parquet"];
        let card = Card::default();
        let (name, found) = of_config(&card, &paths, None).unwrap();
        assert_eq!((name.as_str(), found.splits["train"].len()), ("b", 2));
        assert_eq!(found.splits["train"][0], "b/train/0000.parquet");
        let two = [&paths[..], &["a/partial-train/0000.parquet", "x.py"]].concat();
        let e = of_config(&card, &two, None).unwrap_err();
        assert!(crate::source::advice(&e)[0].contains("`a`, `b`"), "{e:?}");
        let (_, found) = of_config(&card, &two, Some("a")).unwrap();
        assert_eq!(found.splits["train"], ["a/partial-train/0000.parquet"]);
        assert!(of_config(&card, &two, Some("c")).is_err());
        // Another layout is read by the words in it.
        let (_, found) = of_config(&card, &["b/train/x.parquet"], None).unwrap();
        assert_eq!(found.splits.keys().collect::<Vec<_>>(), ["train"]);
    }

    #[test]
    fn names_of_splits() {
        for good in ["train", "train_sft", "en.x", "a-b", "2024"] {
            assert!(is_split_name(good), "{good}");
        }
        for bad in ["", "..", "../x", "/x", "a/b", "a..b", ".a", "a.", "a b", "a\0"] {
            assert!(!is_split_name(bad), "{bad}");
        }
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
        let (name, found) = of_config(&card, &paths, None).unwrap();
        assert_eq!((name.as_str(), found.splits["train"][0].as_str()), ("b", "b/z.csv"));
        let (_, found) = of_config(&card, &paths, Some("a")).unwrap();
        assert_eq!(found.splits["test"], ["a/y.csv"]);
        let e = of_config(&card, &paths, Some("aa")).unwrap_err();
        assert!(crate::source::advice(&e)[0].contains("`a`"), "{e}");
        card.configs = vec![config("a", false, files(&[("train", "c/*")]))];
        let e = of_config(&card, &paths, None).unwrap_err().to_string();
        assert!(e.contains("`c/*`"), "{e}");
        // Patterns are those of the config's own folder.
        let mut below = config("a", false, files(&[("train", "*.csv")]));
        below.data_dir = Some("./a/".into());
        card.configs = vec![below];
        let (_, found) = of_config(&card, &["x.csv", "a/x.csv"], None).unwrap();
        assert_eq!(found.splits["train"], ["a/x.csv"]);
        card.configs = vec![config("a", false, files(&[("../../x", "a/*")]))];
        let e = of_config(&card, &paths, None).unwrap_err().to_string();
        assert!(e.contains("`../../x`"), "{e}");
    }
}
