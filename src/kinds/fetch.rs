//! `fetch`: rows from the hub, from local files or from a URL.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use arrow::array::RecordBatch;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::rows::{ClassNames, SplitWriter};
use crate::artifact::Type;
use crate::data::{self, Card, Format, Found, OnError, Quote, Reading, Scan};
use crate::hub::{RepoFile, RepoType};
use crate::source::{Fault, suggest};
use crate::step::{Context, FileInput, Outside, Ports, Problem, StepKind};

/// Fetches a dataset from the hub, from local files or from a URL.
///
/// Exactly one of `dataset`, `files` and `url` says where the rows come from. Each split becomes
/// a port of the dataset: `data.parquet` and `features.json` (rows, columns, class names).
///
/// Formats are CSV, TSV, JSON, JSON lines, Parquet and text (a row per line, column `text`), each
/// also packed as `.gz` or `.zst`; the file's name says which. CSV and TSV have a header, and
/// types are found from all rows; JSON is a list of objects, an object of several lines with such
/// a list in one field, or an object per line.
///
/// Splits of a hub dataset are those of its card's `configs`; without them, and for a local
/// folder, the words `train`, `test`, `validation` (or `valid`, `val`, `dev`) in file names say
/// the split (a shard's name, as in `train_sft-00000-of-00004`, is taken whole), and without such
/// words all is `train`. Files that are left out are named in a warning.
///
/// Where a hub dataset is only a script, or archives, and no revision is asked for, the Parquet
/// files are taken into which the hub has converted it (`refs/convert/parquet`). Archives are not
/// unpacked.
///
/// A hub revision is pinned to a commit, a URL to a checksum, in the lock beside the pipeline.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Fetch {
    /// Name of a dataset on the hub, like `stanfordnlp/imdb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dataset: Option<String>,
    /// Config (subset) of the dataset; by default the one its card calls the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<String>,
    /// Branch, tag or commit of the dataset; `main` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revision: Option<String>,
    /// A local file or folder, or a map from split to a file, a folder or a list of them; a path
    /// may be a pattern (`data/*.jsonl`, `**/train-*.csv`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    files: Option<Sources>,
    /// A file on the web, as one split (`train`, or the one that `splits` names).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    /// SHA-256 that the URL's content must have; without it the first download is pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    /// Splits to fetch; all by default. To take some rows only, use a `sample` step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    splits: Option<Vec<String>>,
    /// Columns to keep, in this order; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<Vec<String>>,
    /// New names of columns, by old name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rename: BTreeMap<String, String>,
    /// For JSON files that are an object: the field that holds the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    field: Option<String>,
    /// What a quote means in CSV and TSV: `double` (around a field, doubled inside it) or `none`
    /// (quotes are plain text).
    #[serde(default)]
    quote: Quote,
    /// What to do with a row that cannot be read: `fail`, or `skip` it and count it.
    #[serde(default)]
    on_error: OnError,
}

/// Local files: one path whose splits are found from names, or paths by split.
#[derive(Debug, Clone, PartialEq)]
enum Sources {
    One(FileInput),
    Splits(BTreeMap<String, Vec<FileInput>>),
}

impl Sources {
    /// One path, or a pattern: then the files that it names, by the splits that their names say.
    fn resolve_one(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        let Self::One(input) = self else { return Ok(()) };
        let found = outside.files(input)?;
        if let [(_, only)] = found.as_slice() {
            *input = only.clone();
            return Ok(());
        }
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        let Found { splits, left_out } = data::of_names(&names)?;
        if !left_out.is_empty() {
            let message = format!("names do not say the split of {}", left_out.join(", "));
            let help = "give a pattern for each split: `files: { train: …, test: … }`";
            return Err(Fault::new(message).help(help).into());
        }
        let of = |names: Vec<String>| {
            let file = |name: &String| found.iter().find(|(n, _)| n == name).map(|f| f.1.clone());
            names.iter().filter_map(file).collect()
        };
        *self = Self::Splits(splits.into_iter().map(|(split, n)| (split, of(n))).collect());
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Sources {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        fn parse<T: DeserializeOwned, E: serde::de::Error>(value: Value) -> Result<T, E> {
            serde_json::from_value(value).map_err(E::custom)
        }
        let map = match Value::deserialize(d)? {
            Value::Object(map) if !map.contains_key("$file") => map,
            path @ (Value::String(_) | Value::Object(_)) => return parse(path).map(Self::One),
            other => {
                let what = "expected a path, or a map from split to paths";
                return Err(D::Error::custom(format!("{what}, found `{other}`")));
            }
        };
        let splits = map.into_iter().map(|(split, value)| match value {
            Value::Array(items) => {
                let files: Result<Vec<FileInput>, D::Error> =
                    items.into_iter().map(parse).collect();
                Ok((split, files?))
            }
            one => Ok((split, vec![parse(one)?])),
        });
        Ok(Self::Splits(splits.collect::<Result<_, D::Error>>()?))
    }
}

impl Serialize for Sources {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One(file) => file.serialize(s),
            Self::Splits(splits) => splits.serialize(s),
        }
    }
}

impl JsonSchema for Sources {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Sources".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let paths = serde_json::json!({
            "anyOf": [
                { "type": "string" },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 }
            ]
        });
        json_schema!({
            "anyOf": [
                { "type": "string" },
                { "type": "object", "additionalProperties": paths, "minProperties": 1 }
            ]
        })
    }
}

/// A file to be read: the name that says its format, and where it lies.
struct Part {
    name: String,
    path: PathBuf,
}

impl StepKind for Fetch {
    const NAME: &'static str = "fetch";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        let named = match (&self.splits, &self.files, &self.url) {
            (Some(splits), _, _) => Some(splits.clone()),
            (None, Some(Sources::Splits(files)), _) => Some(files.keys().cloned().collect()),
            (None, _, Some(_)) => Some(vec!["train".to_owned()]),
            _ => None,
        };
        match named {
            Some(names) => Ports::named(Type::Dataset, names),
            None => Ports::of(Type::Dataset),
        }
    }

    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        if let Some(dataset) = &self.dataset {
            let revision = self.revision.as_deref();
            self.revision = Some(outside.dataset(dataset, revision)?);
        }
        match &mut self.files {
            Some(files @ Sources::One(_)) => files.resolve_one(outside)?,
            Some(Sources::Splits(splits)) => {
                for files in splits.values_mut() {
                    let found: Result<Vec<_>> = files.iter().map(|f| outside.files(f)).collect();
                    *files = found?.into_iter().flatten().map(|(_, file)| file).collect();
                }
            }
            None => {}
        }
        if let (Some(url), None) = (&self.url, &self.sha256) {
            let fetched = outside.url(url, |hub| Ok(hub.url(url, None, &|_, _| Ok(()))?.0))?;
            self.sha256 = Some(fetched);
        }
        if let Some(sha256) = &mut self.sha256 {
            sha256.make_ascii_lowercase();
        }
        Ok(())
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let given = [
            ("dataset", self.dataset.is_some()),
            ("files", self.files.is_some()),
            ("url", self.url.is_some()),
        ];
        let given: Vec<&str> = given.iter().filter(|(_, is)| *is).map(|(n, _)| *n).collect();
        if given.len() != 1 {
            let message = match given.len() {
                0 => "nothing says where the rows come from".to_owned(),
                _ => format!("`{}` exclude each other", given.join("` and `")),
            };
            problems.push(
                Problem::error("", message).help("set exactly one of `dataset`, `files`, `url`"),
            );
        }
        let only = [
            ("config", self.config.is_some(), self.dataset.is_some(), "dataset"),
            ("revision", self.revision.is_some(), self.dataset.is_some(), "dataset"),
            ("sha256", self.sha256.is_some(), self.url.is_some(), "url"),
        ];
        for (field, set, has, owner) in only {
            if set && !has {
                problems.push(Problem::error(field, format!("`{field}` belongs to `{owner}`")));
            }
        }
        let hex = |s: &String| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit());
        if !self.sha256.as_ref().is_none_or(hex) {
            problems.push(Problem::error("sha256", "a SHA-256 has 64 hex digits"));
        }
        if let Some(url) = &self.url {
            if Format::of_name(url_name(url)).is_none() {
                let help = "known are .parquet, .jsonl, .json, .csv, .tsv, .txt, also .gz or .zst";
                let message = format!("the end of `{url}` does not say what it holds");
                problems.push(Problem::error("url", message).help(help));
            }
            if self.splits.as_ref().is_some_and(|s| s.len() != 1) {
                problems.push(Problem::error("splits", "a URL is one split"));
            }
        }
        problems.extend(self.check_splits());
        for (i, column) in self.columns.iter().flatten().enumerate() {
            if self.columns.iter().flatten().take(i).any(|c| c == column) {
                let message = format!("column `{column}` is named twice");
                problems.push(Problem::error(format!("columns[{i}]"), message));
            }
        }
        problems
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let (splits, classes) = match (&self.dataset, &self.files, &self.url) {
            (Some(dataset), _, _) => self.parts_of_hub(cx, dataset)?,
            (None, Some(files), _) => (self.parts_of_files(cx, files)?, BTreeMap::new()),
            (None, None, Some(url)) => (self.parts_of_url(cx, url)?, BTreeMap::new()),
            (None, None, None) => bail!("nothing says where the rows come from"),
        };
        let total = splits.len() as u64;
        for (done, (split, parts)) in splits.into_iter().enumerate() {
            cx.stop()?;
            cx.progress(done as u64, total, "splits", format!("reading {split}"));
            self.split(cx, &split, &parts, &classes).with_context(|| format!("split `{split}`"))?;
        }
        Ok(())
    }
}

type Parts = BTreeMap<String, Vec<Part>>;

impl Fetch {
    fn check_splits(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let written = match (&self.splits, &self.files) {
            (Some(splits), _) => splits.clone(),
            (None, Some(Sources::Splits(files))) => files.keys().cloned().collect(),
            _ => Vec::new(),
        };
        let field = if self.splits.is_some() { "splits" } else { "files" };
        for (i, split) in written.iter().enumerate() {
            let path = if field == "splits" { format!("splits[{i}]") } else { "files".into() };
            if split.contains(['[', '%']) {
                let message = format!("`{split}` is not the name of a split");
                let help = "take some rows of a split with a `sample` step";
                problems.push(Problem::error(path, message).help(help));
            } else if !data::is_split_name(split) {
                let message = format!("`{split}` is not the name of a split");
                problems.push(Problem::error(path, message).help("letters, digits, `_`, `-`, `.`"));
            } else if written[..i].contains(split) {
                problems.push(Problem::error(path, format!("split `{split}` is named twice")));
            }
        }
        if self.splits.as_ref().is_some_and(Vec::is_empty) {
            problems
                .push(Problem::error("splits", "no split is named").help("leave it out for all"));
        }
        if let Some(Sources::Splits(files)) = &self.files {
            for (split, _) in files.iter().filter(|(_, files)| files.is_empty()) {
                problems.push(Problem::error("files", format!("split `{split}` has no files")));
            }
        }
        problems
    }

    /// Reads the files of a split and writes their rows as they come.
    fn split(
        &self,
        cx: &mut Context<'_>,
        split: &str,
        parts: &[Part],
        classes: &ClassNames,
    ) -> Result<()> {
        let reading = |name| {
            Reading::new(name, self.on_error)
                .field(self.field.as_deref())
                .quote(self.quote)
                .columns(self.columns.as_deref())
        };
        let files = parts.iter().map(|part| (part.path.as_path(), reading(&part.name)));
        let scan = Scan::of(files.collect())?;
        let mut head = scan.head.clone();
        std::mem::take(&mut head.notes).into_iter().for_each(|note| cx.warn(note));
        if head.columns().is_empty() {
            let names: Vec<&str> = parts.iter().map(|p| p.name.as_str()).collect();
            bail!("there is no row with a field in {}", names.join(", "));
        }
        for (column, names) in classes {
            if head.columns().contains(&column.as_str()) {
                head.classes.entry(column.clone()).or_insert_with(|| names.clone());
            }
        }
        if head.skipped > 0 {
            let skipped = head.skipped;
            cx.warn(format!("{skipped} rows of `{split}` could not be read and were left out"));
            cx.fact(&format!("skipped.{split}"), skipped);
        }
        let places: Vec<usize> = match &self.columns {
            Some(columns) => columns.iter().map(|c| head.index_of(c)).collect::<Result<_>>()?,
            None => (0..head.columns().len()).collect(),
        };
        if let Some(columns) = &self.columns {
            head = head.select(columns)?;
        }
        let head = head.rename(&self.rename)?;
        let mut writer = SplitWriter::create(cx, split, head.schema.clone())?;
        let mut done = 0;
        scan.each(&mut |batch| {
            let chosen = batch.project(&places)?;
            writer.write(&RecordBatch::try_new(head.schema.clone(), chosen.columns().to_vec())?)?;
            done += batch.num_rows() as u64;
            cx.progress(done, 0, "rows", split);
            cx.stop()
        })?;
        if writer.finish(cx, &head.classes)? == 0 {
            cx.warn(format!("split `{split}` has no rows"));
        }
        Ok(())
    }

    /// The splits that were asked for, of those there are.
    fn chosen<T>(&self, mut splits: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
        let Some(names) = &self.splits else {
            return Ok(splits);
        };
        let known: Vec<&str> = splits.keys().map(String::as_str).collect();
        if let Some(gone) = names.iter().find(|n| !known.contains(&n.as_str())) {
            let have: Vec<String> = known.iter().map(|k| format!("`{k}`")).collect();
            let message = format!("there is no split `{gone}`, but {}", have.join(", "));
            let fault = Fault::new(message);
            let near = suggest(gone, &known).filter(|s| s.starts_with("did you mean"));
            return Err(near.into_iter().fold(fault, Fault::help).into());
        }
        splits.retain(|name, _| names.contains(name));
        Ok(splits)
    }

    fn parts_of_hub(
        &self,
        cx: &mut Context<'_>,
        dataset: &str,
    ) -> Result<(Parts, BTreeMap<String, Vec<String>>)> {
        let commit = self.revision.as_deref().context("the revision is not resolved")?;
        let tree = cx.hub.tree(RepoType::Dataset, dataset, commit)?;
        let fetch = |file: &RepoFile, name: &str| {
            let progress = |have, all| {
                cx.progress(have, all, "bytes", name);
                cx.stop()
            };
            cx.hub.file(RepoType::Dataset, dataset, commit, file, &progress)
        };
        let card = match tree.iter().find(|f| f.path == "README.md") {
            Some(file) => {
                let text = std::fs::read(fetch(file, &file.path)?)?;
                Card::parse(&String::from_utf8_lossy(&text))
                    .with_context(|| format!("the card of dataset {dataset}"))?
            }
            None => Card::default(),
        };
        let paths: Vec<&str> = tree.iter().map(|f| f.path.as_str()).collect();
        let (config, Found { splits, left_out }) =
            data::of_config(&card, &paths, self.config.as_deref())
                .with_context(|| format!("dataset {dataset}"))?;
        let splits =
            self.chosen(splits).with_context(|| format!("dataset {dataset}, config `{config}`"))?;
        let names: Vec<(&String, &String)> = splits
            .iter()
            .flat_map(|(split, files)| files.iter().map(move |f| (split, f)))
            .collect();
        let listed: BTreeMap<&str, &RepoFile> = tree.iter().map(|f| (f.path.as_str(), f)).collect();
        let files = names.iter().map(|(_, name)| {
            listed.get(name.as_str()).map(|f| (*f).clone()).context("a file of the list")
        });
        let files: Vec<RepoFile> = files.collect::<Result<_>>()?;
        let progress = |have, all| {
            cx.progress(have, all, "bytes", format!("{} files", files.len()));
            cx.stop()
        };
        let paths = cx.hub.files(RepoType::Dataset, dataset, commit, &files, &progress)?;
        let mut parts: Parts = splits.keys().map(|split| (split.clone(), Vec::new())).collect();
        for ((split, name), path) in names.into_iter().zip(paths) {
            parts.entry(split.clone()).or_default().push(Part { path, name: name.clone() });
        }
        warn_left_out(cx, &left_out);
        cx.fact("dataset", format!("{dataset}@{commit}"));
        cx.fact("config", config.clone());
        Ok((parts, card.classes(&config)))
    }

    fn parts_of_files(&self, cx: &mut Context<'_>, files: &Sources) -> Result<Parts> {
        let parts = match files {
            Sources::One(input) if input.path.is_dir() => {
                let found = parts_below(&input.path)?;
                let names: Vec<&str> = found.iter().map(|p| p.name.as_str()).collect();
                let Found { splits, left_out } = data::of_names(&names)
                    .with_context(|| format!("folder {}", input.path.display()))?;
                warn_left_out(cx, &left_out);
                let of = |files: Vec<String>| {
                    let parts = files.into_iter().map(|name| {
                        let path = input.path.join(&name);
                        Part { name, path }
                    });
                    parts.collect()
                };
                splits.into_iter().map(|(split, files)| (split, of(files))).collect()
            }
            Sources::One(input) => {
                let part = part_of(input)?;
                let split = data::of_names(&[&part.name])?.splits;
                let split = split.into_keys().next().context("a split")?;
                Parts::from([(split, vec![part])])
            }
            Sources::Splits(splits) => {
                let mut parts = Parts::new();
                for (split, inputs) in splits {
                    let here: &mut Vec<Part> = parts.entry(split.clone()).or_default();
                    for input in inputs {
                        if input.path.is_dir() {
                            let mut below = parts_below(&input.path)?;
                            let names: Vec<String> = below.iter().map(|p| p.name.clone()).collect();
                            let names: Vec<&str> = names.iter().map(String::as_str).collect();
                            let (taken, left_out) = data::with_rows(&names);
                            below.retain(|p| taken.contains(&p.name.as_str()));
                            warn_left_out(cx, &left_out);
                            here.extend(below);
                        } else {
                            here.push(part_of(input)?);
                        }
                    }
                }
                parts
            }
        };
        self.chosen(parts)
    }

    fn parts_of_url(&self, cx: &Context<'_>, url: &str) -> Result<Parts> {
        let progress = |have, all| {
            cx.progress(have, all, "bytes", url);
            cx.stop()
        };
        let (_, path) = cx.hub.url(url, self.sha256.as_deref(), &progress)?;
        let split = self.splits.iter().flatten().next().map_or("train", String::as_str);
        let part = Part { name: url_name(url).to_owned(), path };
        Ok(Parts::from([(split.to_owned(), vec![part])]))
    }
}

/// Names the files that may hold rows and are not read.
fn warn_left_out(cx: &mut Context<'_>, names: &[impl AsRef<str>]) {
    const SHOWN: usize = 10;
    if names.is_empty() {
        return;
    }
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let more = match names.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    cx.warn(format!("files that belong to no split are left out: {}{more}", shown.join(", ")));
}

/// The last segment of a URL's path.
fn url_name(url: &str) -> &str {
    let path = url.split(['?', '#']).next().unwrap_or(url);
    path.rsplit('/').next().unwrap_or(path)
}

fn part_of(input: &FileInput) -> Result<Part> {
    let name = input.path.file_name().and_then(|n| n.to_str());
    let name = name.with_context(|| format!("{} has no name", input.path.display()))?;
    Ok(Part { name: name.to_owned(), path: input.path.clone() })
}

/// The files below a folder, sorted by path.
fn parts_below(root: &std::path::Path) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let items = std::fs::read_dir(&folder);
        for item in items.with_context(|| format!("reading {}", folder.display()))? {
            let path = item?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(root)?.to_str();
            let name = name.with_context(|| format!("{} is not UTF-8", path.display()))?;
            parts.push(Part { name: name.to_owned(), path: path.clone() });
        }
    }
    parts.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(parts)
}
