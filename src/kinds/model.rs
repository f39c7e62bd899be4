//! `model`: a transformers model from the hub or a local folder.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use safetensors::tensor::Metadata;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::artifact::Type;
use crate::hub::{RepoFile, RepoType};
use crate::source::Fault;
use crate::step::{Context, FileInput, Outside, Ports, StepKind};
use crate::store::{HubFile, Origin};

/// A model from the hub or from a local folder.
///
/// Its ports are `config` (`config.json`, and `generation_config.json` where there is one),
/// `weights` (safetensors, one file or shards with their index; they stay in the hub's cache or
/// in the folder and are not copied) and `tokenizer` (`tokenizer.json` and what goes with it).
/// A hub revision is pinned to a commit, a folder to the digest of its content.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Model {
    /// Name on the hub, like `HuggingFaceTB/SmolLM2-135M-Instruct`, or the path of a folder,
    /// which starts with `./`, `../` or `/`.
    model: Place,
    /// Branch, tag or commit on the hub; `main` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revision: Option<String>,
    /// The name under which adapters and cards refer to it; by default the name on the hub, or
    /// the folder's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// Where a model lies; the way it is written says which.
#[derive(Debug, Clone, PartialEq)]
enum Place {
    Hub(String),
    Folder(FileInput),
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(d)?;
        match &value {
            Value::String(text) => {
                let path = ["./", "../", "/"].iter().any(|p| text.starts_with(p));
                if !path && !matches!(text.as_str(), "." | "..") {
                    return Ok(Self::Hub(text.clone()));
                }
            }
            Value::Object(_) => {}
            other => {
                let what = "expected the name of a model on the hub or the path of a folder";
                return Err(D::Error::custom(format!("{what}, found `{other}`")));
            }
        }
        serde_json::from_value(value).map(Self::Folder).map_err(D::Error::custom)
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Hub(name) => name.serialize(s),
            Self::Folder(folder) => folder.serialize(s),
        }
    }
}

impl JsonSchema for Place {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Place".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

const INDEX: &str = "model.safetensors.index.json";
const WHOLE: &str = "model.safetensors";
const CONFIG: [&str; 2] = ["config.json", "generation_config.json"];

/// Files of a tokenizer beside `tokenizer.json`.
const TOKENIZER: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
];

/// The files of a model, wherever they lie.
struct Source<'a> {
    /// In messages.
    what: String,
    /// Names at the top.
    names: BTreeSet<String>,
    /// The hub's files, or none for a folder.
    hub: Option<(&'a str, &'a str, BTreeMap<String, RepoFile>)>,
    folder: PathBuf,
}

impl Source<'_> {
    /// A readable path of a file, and where it came from.
    fn get(&self, cx: &Context<'_>, name: &str) -> Result<Origin> {
        let Some((repo, commit, files)) = &self.hub else {
            return Ok(Origin { path: self.folder.join(name), hub: None });
        };
        let file = files.get(name).with_context(|| format!("{} has no `{name}`", self.what))?;
        let progress = |have, all| {
            cx.progress(have, all, "bytes", name);
            cx.stop()
        };
        let path = cx.hub.file(RepoType::Model, repo, commit, file, &progress)?;
        let hub = HubFile {
            repo_type: RepoType::Model.as_str().to_owned(),
            repo: (*repo).to_owned(),
            commit: (*commit).to_owned(),
            path: name.to_owned(),
        };
        Ok(Origin { path, hub: Some(hub) })
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Brings these files into the cache, several at once; [`Source::get`] then finds them there.
    fn bring<'a>(&self, cx: &Context<'_>, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let Some((repo, commit, files)) = &self.hub else { return Ok(()) };
        let files: Vec<RepoFile> = names.filter_map(|name| files.get(name).cloned()).collect();
        let progress = |have, all| {
            cx.progress(have, all, "bytes", format!("{} files", files.len()));
            cx.stop()
        };
        cx.hub.files(RepoType::Model, repo, commit, &files, &progress).map(drop)
    }
}

impl StepKind for Model {
    const NAME: &'static str = "model";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        Ports::of(Type::Model)
    }

    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        match &mut self.model {
            Place::Hub(repo) => {
                let commit = outside.commit(RepoType::Model, repo, self.revision.as_deref())?;
                self.revision = Some(commit);
                self.name.get_or_insert_with(|| repo.clone());
            }
            Place::Folder(folder) => {
                outside.file(folder)?;
                let name = folder.path.file_name().and_then(|n| n.to_str()).unwrap_or("model");
                self.name.get_or_insert_with(|| name.to_owned());
            }
        }
        Ok(())
    }

    fn check(&self) -> Vec<crate::step::Problem> {
        let folder = matches!(self.model, Place::Folder(_));
        let wrong = folder && self.revision.is_some();
        let message = "a folder has no revision";
        wrong.then(|| crate::step::Problem::error("revision", message)).into_iter().collect()
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let source = self.source(cx)?;
        let what = &source.what;
        if !source.has("config.json") {
            let fault = Fault::new(format!("{what} has no `config.json`"));
            let help = if source.has("adapter_config.json") {
                "it is a PEFT adapter: name its base model here"
            } else {
                "a transformers model is expected"
            };
            return Err(fault.help(help).into());
        }
        let dir = cx.out_dir("config")?;
        for name in CONFIG.into_iter().filter(|name| source.has(name)) {
            copy(&source.get(cx, name)?.path, &dir.join(name))?;
        }
        let config = std::fs::read(dir.join("config.json"))?;
        serde_json::from_slice::<Value>(&config)
            .with_context(|| format!("`config.json` of {what} is not JSON"))?;
        let name = serde_json::json!({ "name": self.name });
        cx.write_json(&dir, "source.json", &name)?;

        let dir = cx.out_dir("tokenizer")?;
        require_tokenizer(&source)?;
        for name in TOKENIZER.into_iter().filter(|name| source.has(name)) {
            copy(&source.get(cx, name)?.path, &dir.join(name))?;
        }

        cx.out_dir("weights")?;
        let mut bytes = 0;
        for (name, origin) in weights(cx, &source)? {
            bytes += std::fs::metadata(&origin.path)?.len();
            cx.stop()?;
            cx.reference("weights", &name, origin)?;
        }
        cx.fact("weights_bytes", bytes);
        if let Some(commit) = &self.revision {
            cx.fact("commit", commit.clone());
        }
        Ok(())
    }
}

impl Model {
    fn source(&self, cx: &Context<'_>) -> Result<Source<'_>> {
        match &self.model {
            Place::Hub(repo) => {
                let commit = self.revision.as_deref().context("the revision is not resolved")?;
                let tree = cx.hub.tree(RepoType::Model, repo, commit)?;
                let top = tree.into_iter().filter(|f| !f.path.contains('/'));
                let files: BTreeMap<String, RepoFile> = top.map(|f| (f.path.clone(), f)).collect();
                Ok(Source {
                    what: format!("model {repo}"),
                    names: files.keys().cloned().collect(),
                    hub: Some((repo, commit, files)),
                    folder: PathBuf::new(),
                })
            }
            Place::Folder(input) => {
                let folder = input.path.clone();
                let what = format!("folder {}", folder.display());
                ensure!(folder.is_dir(), "{} is not a folder", folder.display());
                let mut names = BTreeSet::new();
                for item in std::fs::read_dir(&folder)? {
                    let item = item?;
                    if item.path().is_file() {
                        names.insert(item.file_name().to_string_lossy().into_owned());
                    }
                }
                Ok(Source { what, names, hub: None, folder })
            }
        }
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let content = std::fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    std::fs::write(to, content).with_context(|| format!("writing {}", to.display()))
}

fn require_tokenizer(source: &Source<'_>) -> Result<()> {
    if source.has("tokenizer.json") {
        return Ok(());
    }
    let slow = ["vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"];
    let slow: Vec<&str> = slow.into_iter().filter(|n| source.has(n)).collect();
    let fault = Fault::new(format!("{} has no `tokenizer.json`", source.what));
    let help = if slow.is_empty() {
        "a model comes with its tokenizer in `tokenizer.json`".to_owned()
    } else {
        let slow = slow.join(", ");
        format!("it only has {slow}: save its fast tokenizer with transformers' `AutoTokenizer`")
    };
    Err(fault.help(help).into())
}

/// The safetensors files, all of them checked, and the index of a sharded model.
fn weights(cx: &Context<'_>, source: &Source<'_>) -> Result<Vec<(String, Origin)>> {
    let what = &source.what;
    let found: Vec<&String> = source.names.iter().filter(|n| n.ends_with(".safetensors")).collect();
    let single = match found.as_slice() {
        _ if source.has(WHOLE) => Some(WHOLE.to_owned()),
        [only] if !source.has(INDEX) => Some((*only).clone()),
        _ => None,
    };
    if let Some(name) = single {
        let origin = source.get(cx, &name)?;
        tensors(&origin.path).with_context(|| format!("`{name}` of {what}"))?;
        return Ok(vec![(name, origin)]);
    }
    if !source.has(INDEX) {
        let old = source.names.iter().any(|n| n.ends_with(".bin") || n.ends_with(".pth"));
        let fault = Fault::new(if found.is_empty() {
            format!("{what} has no safetensors weights")
        } else {
            format!("{what} has several safetensors files and no `{INDEX}`")
        });
        let help = if old {
            "its weights are pickled (.bin): name a revision with safetensors, or convert them"
        } else {
            "`model.safetensors`, or shards with their index, are expected"
        };
        return Err(fault.help(help).into());
    }
    let index = source.get(cx, INDEX)?;
    let text = std::fs::read(&index.path)?;
    let value: Value = serde_json::from_slice(&text)
        .with_context(|| format!("`{INDEX}` of {what} is not JSON"))?;
    let map = value["weight_map"].as_object();
    let map = map.with_context(|| format!("`{INDEX}` of {what} has no `weight_map`"))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().with_context(|| format!("the shard of `{tensor}`"))?;
        shards.entry(shard).or_default().push(tensor);
    }
    ensure!(!shards.is_empty(), "`{INDEX}` of {what} names no shard");
    let gone: Vec<&str> = shards.keys().copied().filter(|s| !source.has(s)).collect();
    if !gone.is_empty() {
        let message = format!("{what} lacks shards that its index names: {}", gone.join(", "));
        return Err(Fault::new(message).help("fetch the whole model").into());
    }
    source.bring(cx, shards.keys().copied())?;
    let mut all = vec![(INDEX.to_owned(), index)];
    for (shard, wanted) in shards {
        let origin = source.get(cx, shard)?;
        let held = tensors(&origin.path).with_context(|| format!("`{shard}` of {what}"))?;
        if let Some(tensor) = wanted.iter().find(|t| !held.contains(**t)) {
            let message = format!("`{shard}` of {what} does not hold `{tensor}`");
            return Err(Fault::new(message).help("its index says that it does").into());
        }
        all.push((shard.to_owned(), origin));
    }
    Ok(all)
}

/// Names of the tensors of a safetensors file, whose header and length are checked.
fn tensors(path: &Path) -> Result<BTreeSet<String>> {
    let damaged = |why: String| {
        let fault = Fault::new(format!("the file is damaged: {why}"));
        anyhow::Error::from(fault.help("fetch it again, or ask whoever made it"))
    };
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let size = file.metadata()?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| damaged("it is too short for a header".into()))?;
    let length = u64::from_le_bytes(length);
    // The format's own limit on headers, and what keeps a wild length from filling the memory.
    if length > 100_000_000 || length.saturating_add(8) > size {
        return Err(damaged(format!("its header would have {length} bytes")));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| damaged(format!("its header: {e}")))?;
    let whole = 8 + length + metadata.data_len() as u64;
    if whole != size {
        return Err(damaged(format!("it should have {whole} bytes and has {size}")));
    }
    Ok(metadata.offset_keys().into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    fn good() -> Vec<u8> {
        let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(&[0; 8]);
        bytes
    }

    #[test]
    fn damaged_safetensors_are_refused() {
        let names = tensors(file(&good()).path()).unwrap();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["a"]);
        let bytes = good();
        for cut in [0, 7, 8, 20, bytes.len() - 1] {
            let e = tensors(file(&bytes[..cut]).path()).unwrap_err().to_string();
            assert!(e.contains("damaged"), "{cut}: {e}");
        }
        let mut longer = good();
        longer.push(0);
        assert!(tensors(file(&longer).path()).is_err());
        let mut wild = good();
        wild[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(tensors(file(&wild).path()).is_err());
        let mut odd = good();
        odd[9] = b'!';
        assert!(tensors(file(&odd).path()).is_err());
    }

    #[test]
    fn the_way_it_is_written_says_where_it_lies() {
        let place = |text: &str| serde_json::from_value::<Place>(text.into()).unwrap();
        assert_eq!(place("org/name"), Place::Hub("org/name".into()));
        assert!(matches!(place("./org/name"), Place::Folder(_)));
        assert!(matches!(place("../name"), Place::Folder(_)));
        assert!(matches!(place("/models/name"), Place::Folder(_)));
    }
}
