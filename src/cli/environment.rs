//! The one place that reads the environment: where the hub, the store and the project are.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use crate::hub::{ENDPOINT, Hub, HubSettings, Token};

/// Everything that the environment says, read once.
pub(super) struct Environment {
    /// All variables, for `${env.NAME}`, declared `env:` and `secrets:`.
    pub(super) variables: BTreeMap<String, String>,
}

impl Environment {
    pub(super) fn read() -> Self {
        Self { variables: env::vars().collect() }
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

    /// The store: `--store`, else `FLOW_STORE`, else `.flow` in the project root.
    pub(super) fn store_dir(&self, asked: Option<&Path>, root: &Path) -> PathBuf {
        let named = asked.map(Path::to_path_buf).or_else(|| self.get("FLOW_STORE").map(Into::into));
        named.unwrap_or_else(|| root.join(".flow"))
    }

    /// The worker for GPU steps: `FLOW_CUDA_WORKER`, else `flow-cuda` beside this program.
    pub(super) fn cuda_worker(&self) -> Option<PathBuf> {
        let named = self.get("FLOW_CUDA_WORKER").map(PathBuf::from);
        let beside = || env::current_exe().ok().map(|exe| exe.with_file_name("flow-cuda"));
        named.or_else(beside).filter(|p| p.is_file())
    }
}

/// The nearest ancestor of a path with `flow.toml` or `.git`, else the working directory.
pub(super) fn project_root(from: &Path) -> PathBuf {
    let here = env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    let from = here.join(from);
    let marked = |dir: &&Path| dir.join("flow.toml").is_file() || dir.join(".git").exists();
    from.ancestors().skip(1).find(marked).map_or(here, Path::to_path_buf)
}
