//! The client against a server in this process that can cut, damage and refuse.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha1::Digest as _;

use super::*;
use crate::source::advice;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const BODY: &[u8] = b"some rows of text\nand some more\n";

mod refusals;

/// What the server does with the next requests for files, first to last; then it behaves.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Answers this status.
    Status(u16),
    /// Answers this status with a header line.
    With(u16, &'static str),
    /// Sends the client to the same path of the server in `State::elsewhere`.
    Redirect,
    /// Sends so many bytes of the body and hangs up.
    Cut(usize),
    /// Changes a byte of the body.
    Flip,
    /// Cuts, and has another content from then on.
    Replace(usize, &'static [u8]),
}

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    /// Requests as `path` or `path bytes=5-`.
    seen: Vec<String>,
    files: BTreeMap<String, Vec<u8>>,
    /// Names in the list of files that are not those of `files`.
    listed: Vec<String>,
    token: Option<String>,
    /// Whether a refusal is for terms that were not accepted.
    gated: bool,
    /// Whether files have an `ETag`, and `If-Range` is obeyed.
    tags: bool,
    /// Where [`Fault::Redirect`] sends.
    elsewhere: String,
    /// `Authorization` of each request for a file; empty if there is none.
    tokens: Vec<String>,
}

struct Server {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(n, b)| ((*n).to_owned(), b.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, &shared));
            }
        });
        Self { endpoint, state }
    }

    fn with(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// Requests that named a file.
    fn transfers(&self) -> Vec<String> {
        let seen = self.state.lock().unwrap().seen.clone();
        seen.into_iter().filter(|s| s.contains("/resolve/")).collect()
    }

    fn hub(&self, cache: &Path) -> Hub {
        let endpoint = self.endpoint.clone();
        let mut hub = Hub::new(HubSettings { endpoint, ..HubSettings::new(cache) });
        hub.http.set_backoff(Duration::from_millis(1));
        hub
    }
}

fn git(body: &[u8]) -> String {
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {}\0", body.len()));
    hasher.update(body);
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn sha256(body: &[u8]) -> String {
    sha2::Sha256::digest(body).iter().map(|b| format!("{b:02x}")).collect()
}

fn serve(mut stream: TcpStream, shared: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines.map_while(Result::ok).take_while(|l| !l.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut state = shared.lock().unwrap();
    let range = headers.get("range").cloned().unwrap_or_default();
    state.seen.push(format!("{path} {range}").trim().to_owned());
    let mut send = |code: u16, more: &str, body: &[u8], cut: usize| {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {code} X\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"
        );
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&body[..cut.min(length)]);
        let _ = stream.flush();
    };
    let wanted = state.token.as_ref().map(|t| format!("Bearer {t}"));
    if wanted.is_some() && headers.get("authorization") != wanted.as_ref() {
        let error = if state.gated { "GatedRepo" } else { "RepoNotFound" };
        return send(401, &format!("X-Error-Code: {error}\r\n"), b"no", 2);
    }
    if path.contains("/revision/") {
        if path.contains("absent") {
            return send(404, "X-Error-Code: RevisionNotFound\r\n", b"", 0);
        }
        return send(200, "", format!("{{\"sha\":\"{COMMIT}\"}}").as_bytes(), 999);
    }
    if path.contains("/tree/") {
        // One file a page, the next page by `Link`.
        let page: usize = path.split("page=").nth(1).map_or(0, |n| n.parse().unwrap());
        let mut items: Vec<_> = state
            .files
            .iter()
            .map(|(name, body)| match name.ends_with(".big") {
                true => serde_json::json!({
                    "type": "file", "path": name, "size": body.len(), "oid": "0".repeat(40),
                    "lfs": { "oid": sha256(body), "size": body.len() }
                }),
                false => serde_json::json!({
                    "type": "file", "path": name, "size": body.len(), "oid": git(body)
                }),
            })
            .collect();
        items.extend(state.listed.iter().map(|name| {
            serde_json::json!({ "type": "file", "path": name, "size": 1, "oid": "0".repeat(40) })
        }));
        let route = path.split('?').next().unwrap();
        let next = format!("Link: <{route}?page={}>; rel=\"next\"\r\n", page + 1);
        let more = if page + 1 < items.len() { next.as_str() } else { "" };
        let body = serde_json::to_vec(&items[page..(page + 1).min(items.len())]).unwrap();
        return send(200, more, &body, usize::MAX);
    }
    state.tokens.push(headers.get("authorization").cloned().unwrap_or_default());
    let name = path.rsplit(&format!("/{COMMIT}/")).next().unwrap();
    let name = name.replace("%20", " ").replace("%23", "#");
    let Some(mut body) = state.files.get(name.trim_start_matches('/')).cloned() else {
        return send(404, "X-Error-Code: EntryNotFound\r\n", b"", 0);
    };
    let fault = (!state.faults.is_empty()).then(|| state.faults.remove(0));
    let tag = format!("\"{}\"", git(&body));
    let stale = headers.get("if-range").is_some_and(|tagged| *tagged != tag);
    let range = if stale { "" } else { range.as_str() };
    let from: Option<usize> =
        range.strip_prefix("bytes=").and_then(|r| r.trim_end_matches('-').parse().ok());
    let (mut code, mut more) = (200, String::new());
    if let Some(from) = from {
        let all = body.len();
        body.drain(..from);
        (code, more) = (206, format!("Content-Range: bytes {from}-{}/{all}\r\n", all - 1));
    }
    if state.tags {
        more += &format!("ETag: {tag}\r\n");
    }
    if let Some(Fault::Replace(_, other)) = fault {
        state.files.values_mut().for_each(|body| *body = other.to_vec());
    }
    match fault {
        Some(Fault::Status(code)) => send(code, "", b"an error page", 99),
        Some(Fault::With(code, header)) => send(code, &format!("{header}\r\n"), b"", 0),
        Some(Fault::Redirect) => {
            let to = format!("Location: {}{path}\r\n", state.elsewhere);
            send(302, &to, b"", 0);
        }
        Some(Fault::Cut(n) | Fault::Replace(n, _)) => send(code, &more, &body, n),
        Some(Fault::Flip) => {
            body[0] ^= 1;
            send(code, &more, &body, usize::MAX);
        }
        None => send(code, &more, &body, usize::MAX),
    }
}

fn quiet(_: u64, _: u64) -> Result<()> {
    Ok(())
}

fn get(hub: &Hub, name: &str) -> Result<PathBuf> {
    let tree = hub.tree(RepoType::Dataset, "org/name", COMMIT)?;
    let file = tree.into_iter().find(|f| f.path == name).unwrap();
    hub.file(RepoType::Dataset, "org/name", COMMIT, &file, &quiet)
}

/// Everything under the cache that a reader of the shared layout looks at.
fn blobs(cache: &Path) -> Vec<String> {
    let folder = cache.join("datasets--org--name/blobs");
    let items = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        items.map(|i| i.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn the_cache_has_the_shared_layout() {
    let server = Server::start(&[("data/a b#c.csv", BODY), ("empty", b""), ("w.big", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    assert_eq!(hub.commit(RepoType::Dataset, "org/name", "main").unwrap(), COMMIT);
    let root = dir.path().join("datasets--org--name");
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let path = get(&hub, "data/a b#c.csv").unwrap();
    assert_eq!(path, root.join("snapshots").join(COMMIT).join("data/a b#c.csv"));
    let target = PathBuf::from(format!("../../../blobs/{}", git(BODY)));
    assert_eq!(std::fs::read_link(&path).unwrap(), target);
    assert_eq!(std::fs::read(path).unwrap(), BODY);
    assert_eq!(std::fs::read(get(&hub, "empty").unwrap()).unwrap(), b"");
    let big = get(&hub, "w.big").unwrap();
    let target = PathBuf::from(format!("../../blobs/{}", sha256(BODY)));
    assert_eq!(std::fs::read_link(big).unwrap(), target);
    // What hf-hub's own reader finds.
    let theirs = hf_hub::Cache::new(dir.path().into()).dataset("org/name".into());
    assert!(theirs.get("w.big").is_some());
}

#[test]
fn what_is_there_is_not_asked_for_again() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    get(&server.hub(dir.path()), "a.csv").unwrap();
    let before = server.state.lock().unwrap().seen.len();
    get(&server.hub(dir.path()), "a.csv").unwrap();
    assert_eq!(server.state.lock().unwrap().seen.len(), before);
}

#[test]
fn a_cut_body_is_resumed() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| s.faults = vec![Fault::Cut(5), Fault::Cut(7)]);
    let dir = tempfile::tempdir().unwrap();
    let path = get(&server.hub(dir.path()), "a.csv").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), BODY);
    let ranges: Vec<String> = server
        .transfers()
        .iter()
        .map(|t| t.split_once(' ').map_or(String::new(), |(_, r)| r.to_owned()))
        .collect();
    assert_eq!(ranges, ["", "bytes=5-", "bytes=12-"]);
}

#[test]
fn a_body_that_is_always_cut_ends_in_an_error_and_keeps_what_came() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| {
        s.faults = vec![Fault::Cut(5), Fault::Cut(0), Fault::Cut(0), Fault::Cut(0), Fault::Cut(0)];
    });
    let dir = tempfile::tempdir().unwrap();
    let e = get(&server.hub(dir.path()), "a.csv").unwrap_err();
    assert!(e.to_string().contains("broke"), "{e:#}");
    assert_eq!(blobs(dir.path()), [format!("{}.incomplete", git(BODY))]);
}

#[test]
fn busy_servers_are_asked_again() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| s.faults = vec![Fault::Status(429), Fault::Status(503), Fault::Status(500)]);
    let dir = tempfile::tempdir().unwrap();
    let path = get(&server.hub(dir.path()), "a.csv").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), BODY);
    server.with(|s| {
        s.files.insert("b.csv".into(), b"other".to_vec());
        s.faults = vec![Fault::Status(500); 9];
    });
    let fresh = tempfile::tempdir().unwrap();
    let e = get(&server.hub(fresh.path()), "b.csv").unwrap_err();
    assert!(e.to_string().contains("answered 500"), "{e:#}");
    assert_eq!(server.transfers().iter().filter(|t| t.contains("b.csv")).count(), 4);
}

#[test]
fn a_flipped_byte_never_lands() {
    for name in ["a.csv", "a.big"] {
        let server = Server::start(&[(name, BODY)]);
        server.with(|s| s.faults = vec![Fault::Flip]);
        let dir = tempfile::tempdir().unwrap();
        let e = get(&server.hub(dir.path()), name).unwrap_err().to_string();
        assert!(e.contains("wrong content") && e.contains(name), "{e}");
        assert_eq!(blobs(dir.path()), [""; 0]);
        assert_eq!(std::fs::read(get(&server.hub(dir.path()), name).unwrap()).unwrap(), BODY);
    }
}

#[test]
fn a_bad_rest_of_an_earlier_try_is_replaced() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("datasets--org--name/blobs");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{}.incomplete", git(BODY))), b"rotten").unwrap();
    let path = get(&server.hub(dir.path()), "a.csv").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), BODY);
}

#[test]
fn a_blob_that_rots_in_the_cache_is_found_and_replaced() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let path = get(&server.hub(dir.path()), "a.csv").unwrap();
    let mut rotten = BODY.to_vec();
    rotten[3] ^= 1;
    std::fs::write(&path, &rotten).unwrap();
    let mut offline = server.hub(dir.path());
    offline.settings.offline = true;
    assert!(get(&offline, "a.csv").is_err());
    let path = get(&server.hub(dir.path()), "a.csv").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), BODY);
}

#[test]
fn a_refusal_speaks_of_the_token() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| s.token = Some("secret".into()));
    let dir = tempfile::tempdir().unwrap();
    let e = server.hub(dir.path()).commit(RepoType::Model, "org/name", "main").unwrap_err();
    assert!(e.to_string().contains("without a token"), "{e}");
    assert!(advice(&e)[0].contains("HF_TOKEN"), "{e:?}");
    let with = |token: &str| {
        let mut settings = HubSettings::new(dir.path());
        settings.endpoint = server.endpoint.clone();
        settings.token = Some(Token::new(token));
        Hub::new(settings)
    };
    let e = with("wrong").commit(RepoType::Model, "org/name", "main").unwrap_err();
    assert!(e.to_string().contains("with this token"), "{e}");
    let good = with(" secret\n");
    assert_eq!(good.commit(RepoType::Model, "org/name", "main").unwrap(), COMMIT);
    let shown = format!("{good:?} {}", serde_json::to_string(good.settings()).unwrap());
    assert!(!shown.contains("secret"), "{shown}");
}

#[test]
fn what_is_not_there_is_named() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let e = server.hub(dir.path()).commit(RepoType::Model, "org/name", "absent").unwrap_err();
    assert!(e.to_string().contains("no revision `absent`"), "{e}");
}

#[test]
fn an_unreachable_hub_says_what_to_set() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("http://127.0.0.1:{port}");
    let hub = Hub::new(HubSettings { endpoint: endpoint.clone(), ..HubSettings::new(dir.path()) });
    let e = hub.commit(RepoType::Dataset, "org/name", "main").unwrap_err();
    assert!(e.to_string().contains(&endpoint), "{e}");
    let help = advice(&e).join(" ");
    assert!(help.contains("HF_ENDPOINT") && help.contains("HF_HUB_OFFLINE"), "{help}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn offline_only_the_cache_is_read() {
    let server = Server::start(&[("a.csv", BODY), ("b.csv", b"b")]);
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    hub.commit(RepoType::Dataset, "org/name", "main").unwrap();
    get(&hub, "a.csv").unwrap();
    let before = server.state.lock().unwrap().seen.len();
    let mut offline = server.hub(dir.path());
    offline.settings.offline = true;
    assert_eq!(offline.commit(RepoType::Dataset, "org/name", "main").unwrap(), COMMIT);
    assert_eq!(std::fs::read(get(&offline, "a.csv").unwrap()).unwrap(), BODY);
    let e = get(&offline, "b.csv").unwrap_err();
    assert!(advice(&e)[0].contains("HF_HUB_OFFLINE"), "{e:?}");
    assert!(offline.commit(RepoType::Dataset, "org/other", "main").is_err());
    // A cache that another program filled may hold a part of the repository.
    std::fs::remove_dir_all(dir.path().join(".flow")).unwrap();
    let e = offline.tree(RepoType::Dataset, "org/name", COMMIT).unwrap_err();
    let folder = dir.path().join("datasets--org--name/snapshots").join(COMMIT);
    assert!(e.to_string().contains("only a part"), "{e}");
    assert!(advice(&e)[0].contains(folder.to_str().unwrap()), "{e:?}");
    // Python's client leaves a list.
    let list = serde_json::json!({ "format_version": 1, "files": {
        "a.csv": { "size": BODY.len(), "blob_id": git(BODY) },
        "w.big": { "size": 1, "blob_id": git(b"p"), "lfs_sha256": sha256(b"w"), "lfs_size": 1 },
    }});
    let path = dir.path().join(format!("datasets--org--name/trees/{COMMIT}.json"));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, list.to_string()).unwrap();
    let tree = offline.tree(RepoType::Dataset, "org/name", COMMIT).unwrap();
    let digests: Vec<&str> = tree.iter().map(RepoFile::digest).collect();
    assert_eq!(digests, [git(BODY), sha256(b"w")]);
    assert_eq!(std::fs::read(get(&offline, "a.csv").unwrap()).unwrap(), BODY);
    assert!(get(&offline, "w.big").is_err());
    assert_eq!(server.state.lock().unwrap().seen.len(), before);
}

#[test]
fn a_cache_that_cannot_be_written_serves_what_it_has() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    get(&server.hub(dir.path()), "a.csv").unwrap();
    // Permissions do not stop root; a file in the place of a folder does.
    for folder in [".flow", "datasets--org--name/snapshots", "datasets--org--name/refs"] {
        let _ = std::fs::remove_dir_all(dir.path().join(folder));
        std::fs::write(dir.path().join(folder), "").unwrap();
    }
    let hub = server.hub(dir.path());
    assert_eq!(hub.commit(RepoType::Dataset, "org/name", "main").unwrap(), COMMIT);
    assert_eq!(std::fs::read(get(&hub, "a.csv").unwrap()).unwrap(), BODY);
}

#[test]
fn files_of_the_cache_are_for_all_whom_the_umask_lets() {
    use std::os::unix::fs::PermissionsExt as _;
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    server.hub(dir.path()).commit(RepoType::Dataset, "org/name", "main").unwrap();
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    let main = dir.path().join("datasets--org--name/refs/main");
    assert_eq!(mode(&main), mode(&plain));
}

#[test]
fn a_revision_is_one_segment() {
    let server = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    server.hub(dir.path()).commit(RepoType::Dataset, "org/name", "pr/1?#%").unwrap();
    let seen = server.state.lock().unwrap().seen.clone();
    assert_eq!(seen, ["/api/datasets/org/name/revision/pr%2F1%3F%23%25"]);
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    for bad in ["../../../evil", "/etc/evil", "a/../../b", "a//b", "."] {
        let server = Server::start(&[]);
        server.with(|s| s.listed = vec![bad.to_owned()]);
        let dir = tempfile::tempdir().unwrap();
        let hub = server.hub(dir.path());
        assert!(hub.tree(RepoType::Dataset, "org/name", COMMIT).is_err(), "{bad}");
        let file =
            RepoFile { path: bad.to_owned(), size: 1, oid: "0".repeat(40), lfs_sha256: None };
        assert!(hub.file(RepoType::Dataset, "org/name", COMMIT, &file, &quiet).is_err(), "{bad}");
        let mut digest = file.clone();
        digest.path = "fine".into();
        digest.oid = "../../../../evil".into();
        assert!(hub.file(RepoType::Dataset, "org/name", COMMIT, &digest, &quiet).is_err());
        assert!(hub.commit(RepoType::Dataset, bad, "main").is_err(), "{bad}");
        assert!(hub.commit(RepoType::Dataset, "org/name", bad).is_err(), "{bad}");
    }
}

#[test]
fn urls_are_checked_and_kept_by_content() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let url = format!("{}/a.csv", server.endpoint);
    let (digest, path) = hub.url(&url, None, &quiet).unwrap();
    assert_eq!(digest, sha256(BODY));
    assert_eq!(std::fs::read(path).unwrap(), BODY);
    let before = server.state.lock().unwrap().seen.len();
    hub.url(&url, Some(&digest), &quiet).unwrap();
    assert_eq!(server.state.lock().unwrap().seen.len(), before);
    let other = "0".repeat(64);
    let e = hub.url(&url, Some(&other), &quiet).unwrap_err().to_string();
    assert!(e.contains(&other) && e.contains(&digest), "{e}");
    let kept = std::fs::read_dir(dir.path().join(".flow/urls")).unwrap().count();
    assert_eq!(kept, 1);
    assert!(hub.url("file:///etc/passwd", None, &quiet).is_err());
}

#[test]
fn a_url_that_changes_on_the_way_is_not_mixed() {
    let other = b"quite another text, and longer than the one before";
    for tags in [true, false] {
        let server = Server::start(&[("a.csv", BODY)]);
        server.with(|s| (s.tags, s.faults) = (tags, vec![Fault::Replace(5, other)]));
        let dir = tempfile::tempdir().unwrap();
        let url = format!("{}/a.csv", server.endpoint);
        let (digest, path) = server.hub(dir.path()).url(&url, None, &quiet).unwrap();
        assert_eq!((digest, std::fs::read(path).unwrap()), (sha256(other), other.to_vec()));
        let last = server.state.lock().unwrap().seen[1].clone();
        assert_eq!(last, if tags { "/a.csv bytes=5-" } else { "/a.csv" });
    }
}

#[test]
fn a_later_run_goes_on_with_a_pinned_url() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| {
        s.faults = vec![Fault::Cut(5), Fault::Cut(0), Fault::Cut(0), Fault::Cut(0), Fault::Cut(0)];
    });
    let dir = tempfile::tempdir().unwrap();
    let url = format!("{}/a.csv", server.endpoint);
    let digest = sha256(BODY);
    assert!(server.hub(dir.path()).url(&url, Some(&digest), &quiet).is_err());
    server.with(|s| (s.faults, s.seen) = (Vec::new(), Vec::new()));
    let (_, path) = server.hub(dir.path()).url(&url, Some(&digest), &quiet).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), BODY);
    assert_eq!(server.state.lock().unwrap().seen, ["/a.csv bytes=5-"]);
    assert_eq!(std::fs::read_dir(dir.path().join(".flow/urls")).unwrap().count(), 1);
}

#[test]
fn a_caller_can_stop_a_transfer() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let tree = hub.tree(RepoType::Dataset, "org/name", COMMIT).unwrap();
    let stop = |_, _| bail!("interrupted");
    let e = hub.file(RepoType::Dataset, "org/name", COMMIT, &tree[0], &stop).unwrap_err();
    assert_eq!(e.to_string(), "interrupted");
    assert!(!blobs(dir.path()).contains(&git(BODY)));
}

#[test]
fn two_at_once_fetch_once() {
    let server = Server::start(&[("a.csv", BODY)]);
    let dir = tempfile::tempdir().unwrap();
    let hubs = [server.hub(dir.path()), server.hub(dir.path())];
    std::thread::scope(|scope| {
        for hub in &hubs {
            scope.spawn(|| assert_eq!(std::fs::read(get(hub, "a.csv").unwrap()).unwrap(), BODY));
        }
    });
    assert_eq!(server.transfers().len(), 1);
}
