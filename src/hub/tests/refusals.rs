//! What the hub refuses or puts off, and several files at once.

use super::*;

#[test]
fn a_pause_that_the_server_asks_for_is_kept() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| s.faults = vec![Fault::With(429, "Retry-After: 1")]);
    let dir = tempfile::tempdir().unwrap();
    let started = std::time::Instant::now();
    assert_eq!(std::fs::read(get(&server.hub(dir.path()), "a.csv").unwrap()).unwrap(), BODY);
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
    // A pause can be ended.
    server.with(|s| {
        s.files.insert("b.csv".into(), b"b".to_vec());
        s.faults = vec![Fault::With(429, "RateLimit: \"resolvers\";r=0;t=200")];
    });
    let fresh = tempfile::tempdir().unwrap();
    let hub = server.hub(fresh.path());
    let tree = hub.tree(RepoType::Dataset, "org/name", COMMIT).unwrap();
    let started = std::time::Instant::now();
    let stop = |_, _| bail!("interrupted");
    let e = hub.file(RepoType::Dataset, "org/name", COMMIT, &tree[1], &stop).unwrap_err();
    assert_eq!(e.to_string(), "interrupted");
    assert!(started.elapsed() < Duration::from_secs(100));
}

#[test]
fn too_many_requests_are_explained() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| s.faults = vec![Fault::Status(429); 9]);
    let dir = tempfile::tempdir().unwrap();
    let e = get(&server.hub(dir.path()), "a.csv").unwrap_err();
    assert!(e.to_string().contains("no more requests"), "{e}");
    assert!(advice(&e)[0].contains("HF_TOKEN"), "{e:?}");
    assert_eq!(server.transfers().len(), 4);
}

#[test]
fn a_gated_repository_names_the_page_of_its_terms() {
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| (s.token, s.gated) = (Some("secret".into()), true));
    let dir = tempfile::tempdir().unwrap();
    for (ty, page) in [(RepoType::Dataset, "/datasets/org/name"), (RepoType::Model, "/org/name")] {
        let e = server.hub(dir.path()).commit(ty, "org/name", "main").unwrap_err();
        assert!(e.to_string().contains("is gated"), "{e}");
        let help = advice(&e).join(" ");
        let page = format!("{}{page} and set HF_TOKEN", server.endpoint);
        assert!(help.contains(&page), "{help}");
    }
    let denied = Server::start(&[("a.csv", BODY)]);
    denied.with(|s| s.faults = vec![Fault::With(403, "X-Error-Message: not for you")]);
    let e = get(&denied.hub(dir.path()), "a.csv").unwrap_err();
    assert!(e.to_string().contains("without a token (not for you)"), "{e}");
    assert_eq!(denied.transfers().len(), 1, "a refusal is not asked again");
}

#[test]
fn the_token_stays_with_the_hub() {
    let elsewhere = Server::start(&[("a.csv", BODY)]);
    let server = Server::start(&[("a.csv", BODY)]);
    server.with(|s| {
        s.faults = vec![Fault::Redirect];
        s.elsewhere = elsewhere.endpoint.replace("127.0.0.1", "localhost");
        s.token = Some("secret".into());
    });
    let dir = tempfile::tempdir().unwrap();
    let mut settings = HubSettings::new(dir.path());
    settings.endpoint = server.endpoint.clone();
    settings.token = Some(Token::new("secret"));
    let hub = Hub::new(settings);
    assert_eq!(std::fs::read(get(&hub, "a.csv").unwrap()).unwrap(), BODY);
    assert_eq!(server.state.lock().unwrap().tokens, ["Bearer secret"]);
    assert_eq!(elsewhere.state.lock().unwrap().tokens, [""]);
    // Nor does a plain URL get it.
    hub.url(&format!("{}/a.csv", elsewhere.endpoint), None, &quiet).unwrap();
    assert_eq!(elsewhere.state.lock().unwrap().tokens, ["", ""]);
}

#[test]
fn several_files_come_at_once() {
    let names: Vec<String> = (0..20).map(|i| format!("data/{i:02}.csv")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), n.as_bytes())).collect();
    let server = Server::start(&files);
    server.with(|s| s.faults = vec![Fault::Cut(3), Fault::Status(500), Fault::Cut(1)]);
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let tree = hub.tree(RepoType::Dataset, "org/name", COMMIT).unwrap();
    let most = Mutex::new((0, 0));
    let progress = |have, all| {
        let mut most = most.lock().unwrap();
        *most = (most.0.max(have), all);
        Ok(())
    };
    let paths = hub.files(RepoType::Dataset, "org/name", COMMIT, &tree, &progress).unwrap();
    for (path, name) in paths.iter().zip(&names) {
        assert_eq!(std::fs::read_to_string(path).unwrap(), *name);
    }
    let all: u64 = tree.iter().map(|f| f.size).sum();
    assert_eq!(*most.lock().unwrap(), (all, all));
    // All that is there already is not asked for again.
    let before = server.transfers().len();
    hub.files(RepoType::Dataset, "org/name", COMMIT, &tree, &quiet).unwrap();
    assert_eq!(server.transfers().len(), before);
}

#[test]
fn one_bad_file_of_several_is_named() {
    let server = Server::start(&[("a.csv", BODY), ("b.csv", b"b"), ("c.csv", b"c")]);
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let tree = hub.tree(RepoType::Dataset, "org/name", COMMIT).unwrap();
    server.with(|s| {
        s.files.insert("b.csv".into(), b"B".to_vec());
    });
    let e = hub.files(RepoType::Dataset, "org/name", COMMIT, &tree, &quiet).unwrap_err();
    assert!(e.to_string().contains("`b.csv`") && e.to_string().contains("wrong content"), "{e}");
    assert!(!blobs(dir.path()).contains(&git(b"B")));
}
