//! The one place that reads the environment: where the hub, the store and the project are.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use crate::engine::Gpu;
use crate::hub::{ENDPOINT, Hub, HubSettings, Token};

/// The variable that tells CUDA which GPUs there are.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// Everything that the environment says, read once.
pub(super) struct Environment {
    /// All variables that are Unicode, for `${env.NAME}`, declared `env:` and `secrets:`.
    pub(super) variables: BTreeMap<String, String>,
}

impl Environment {
    pub(super) fn read() -> Self {
        let unicode = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self { variables: env::vars_os().filter_map(unicode).collect() }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    fn is_on(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str()))
    }

    /// Whether colours and bars are unwanted (`NO_COLOR`, or a terminal that cannot).
    pub(super) fn plain(&self) -> bool {
        self.get("NO_COLOR").is_some() || self.get("TERM") == Some("dumb")
    }

    /// The NVIDIA GPUs that this process is let see, where `CUDA_VISIBLE_DEVICES` says it.
    pub(super) fn visible_gpus(&self) -> Option<(Vec<Gpu>, String)> {
        let value = self.variables.get(VISIBLE)?;
        Some((Gpu::listed(value), format!("`{VISIBLE}` is `{value}`")))
    }

    /// The NVIDIA GPUs of the machine that this process may use, and where they were looked for.
    /// Looks for the driver's devices only: asking the driver itself takes a moment.
    pub(super) fn gpus(&self) -> (Vec<Gpu>, String) {
        let there = || {
            // One look, where a run without changes should cost nothing.
            let driver = ["/dev/nvidiactl", "/dev/dxg"].iter().any(|path| Path::new(path).exists());
            if !driver {
                return Vec::new();
            }
            let names = std::fs::read_dir("/dev").into_iter().flatten().flatten();
            let index = |name: OsString| name.to_str()?.strip_prefix("nvidia")?.parse().ok();
            let mut found: Vec<u32> = names.filter_map(|entry| index(entry.file_name())).collect();
            found.sort_unstable();
            // Under WSL there is one device for all, and no way to count.
            if found.is_empty() && Path::new("/dev/dxg").exists() { vec![0] } else { found }
        };
        self.visible_gpus().unwrap_or_else(|| {
            let gpus = there().into_iter().map(Gpu::Index).collect();
            (gpus, "looked for `/dev/nvidia0`, `1`, …, which NVIDIA's driver makes".to_owned())
        })
    }

    /// The hub as Python's `huggingface_hub` would find it: same variables, same cache.
    pub(super) fn hub(&self, offline: bool) -> Hub {
        let home = self.get("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
        let hf_home = self.get("HF_HOME").map_or_else(
            || {
                let cache = self.get("XDG_CACHE_HOME").map(PathBuf::from);
                cache.unwrap_or_else(|| home.join(".cache")).join("huggingface")
            },
            PathBuf::from,
        );
        let cache = self.get("HF_HUB_CACHE").map_or_else(|| hf_home.join("hub"), PathBuf::from);
        let token_file = self.get("HF_TOKEN_PATH").map_or(hf_home.join("token"), PathBuf::from);
        let token = self.get("HF_TOKEN").map(str::to_owned).or_else(|| {
            let text = std::fs::read_to_string(token_file).ok()?;
            Some(text.trim().to_owned()).filter(|t| !t.is_empty())
        });
        let endpoint = self.get("HF_ENDPOINT").unwrap_or(ENDPOINT);
        Hub::new(HubSettings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache_dir: cache,
            token: token.map(|t| Token::new(&t)),
            offline: offline || self.is_on("HF_HUB_OFFLINE"),
        })
    }

    /// The store that `--store` or else `FLOW_STORE` names.
    pub(super) fn store_dir(&self, asked: Option<&Path>) -> Option<PathBuf> {
        asked.map(Path::to_path_buf).or_else(|| self.get("FLOW_STORE").map(Into::into))
    }
}

/// The nearest of a folder and those above it with `flow.toml` or `.git`, else the working
/// directory.
pub(super) fn project_root(dir: &Path) -> PathBuf {
    let here = env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    let marked = |dir: &&Path| dir.join("flow.toml").is_file() || dir.join(".git").exists();
    normal(&here.join(dir)).ancestors().find(marked).map_or(here, Path::to_path_buf)
}

/// A path without `.` and `..`: what is above `a/../b` is not `a`.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_a_project() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        std::fs::create_dir_all(one.join("deep/er")).unwrap();
        std::fs::create_dir_all(one.join(".git")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        std::fs::write(other.join("flow.toml"), "").unwrap();
        assert_eq!(project_root(&one), one, "the folder itself counts");
        assert_eq!(project_root(&one.join("deep/./er")), one);
        assert_eq!(project_root(&one.join("deep/../../other")), other);
    }
}
