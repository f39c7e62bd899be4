//! The rules of the house, held by reading the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const LINES: usize = 600;
const COLUMNS: usize = 100;

/// Rooms by floor; a floor may import floors below it, and rooms on one floor not each other.
const FLOORS: [&[&str]; 8] = [
    &["digest", "source", "yaml"],
    &["store"],
    &["artifact", "lineage", "hub", "data", "text", "learn"],
    &["step"],
    &["pipeline", "kinds"],
    &["engine"],
    &["report", "export", "import"],
    &["cli", "main"],
];

/// Imports along one floor: the YAML tree reports mistakes as diagnostics, and a record names the
/// type of artifact that it records.
const ALLOWED: [(&str, &str); 2] = [("yaml", "source"), ("lineage", "artifact")];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn sources(folders: &[&str]) -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for folder in folders {
        if root().join(folder).is_dir() {
            rust_files(&root().join(folder), &mut paths);
        }
    }
    let named = paths.into_iter().map(|p| {
        let name = p.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        (name, fs::read_to_string(&p).unwrap())
    });
    named.collect()
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

fn room_of(path: &str) -> String {
    let inside = path.strip_prefix("src/").unwrap();
    inside.split('/').next().unwrap().trim_end_matches(".rs").to_owned()
}

/// Names after `crate::` anywhere in a file, braces at the first level included.
fn imports(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let names: Vec<&str> = if let Some(group) = rest.strip_prefix('{') {
            let end = group.find('}').unwrap_or(group.len());
            group[..end].split(',').collect()
        } else {
            vec![rest]
        };
        for name in names {
            let name = name.trim();
            let end =
                name.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(name.len());
            found.insert(name[..end].to_owned());
        }
    }
    found
}

#[test]
fn floors_import_downwards_only() {
    let mut wrong = Vec::new();
    for (path, text) in sources(&["src"]) {
        let room = room_of(&path);
        let Some(own) = floor(&room) else {
            assert_eq!(room, "lib", "{path} is in no room of the house");
            continue;
        };
        for name in imports(&text) {
            let Some(other) = floor(&name) else { continue };
            let allowed = ALLOWED.contains(&(room.as_str(), name.as_str()));
            if name != room && other >= own && !allowed {
                wrong.push(format!("{path} imports crate::{name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_roof_reads_the_environment() {
    let mut wrong = Vec::new();
    for (path, text) in sources(&["src"]) {
        let roof = path.starts_with("src/cli/") || path == "src/main.rs";
        if !roof && (text.contains("env::var") || text.contains("process::exit")) {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn files_stay_short() {
    let mut wrong = Vec::new();
    for (path, text) in sources(&["src", "tests", "examples", "benches"]) {
        let lines = text.lines().count();
        if lines > LINES {
            wrong.push(format!("{path} has {lines} lines; {LINES} is the most"));
        }
        for (i, line) in text.lines().enumerate() {
            if line.chars().count() > COLUMNS {
                wrong.push(format!("{path}:{} is wider than {COLUMNS} columns", i + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_are_found() {
    let text = "use crate::{store::Store, digest};\nlet x = crate::hub::Hub;";
    let names: Vec<String> = imports(text).into_iter().collect();
    assert_eq!(names, ["digest", "hub", "store"]);
}

/// Compares a generated text with the committed one; `FLOW_BLESS=1 cargo test tidy` writes it.
fn hold(path: &Path, fresh: &str, stale: &mut Vec<String>) {
    let committed = fs::read_to_string(path).unwrap_or_default();
    if committed == fresh {
        return;
    }
    if std::env::var_os("FLOW_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, fresh).unwrap();
    } else {
        stale.push(path.strip_prefix(root()).unwrap().display().to_string());
    }
}

#[test]
fn generated_files_are_fresh() {
    let mut stale = Vec::new();
    let schemas = flow::cli::schemas(flow::kinds::ALL);
    for (name, text) in &schemas {
        hold(&root().join("schemas").join(name), text, &mut stale);
    }
    for entry in fs::read_dir(root().join("schemas")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !schemas.iter().any(|(known, _)| *known == name) {
            stale.push(format!("schemas/{name} belongs to no kind"));
        }
    }
    let readme = root().join("README.md");
    let text = fs::read_to_string(&readme).unwrap();
    let start = text.find("<!-- kinds:").unwrap();
    let start = start + text[start..].find('\n').unwrap() + 1;
    let end = text.find("<!-- end of kinds -->").unwrap();
    let table = flow::cli::kinds_table(flow::kinds::ALL);
    let fresh = format!("{}{table}{}", &text[..start], &text[end..]);
    hold(&readme, &fresh, &mut stale);
    let help = "`FLOW_BLESS=1 cargo test tidy` writes them";
    assert!(stale.is_empty(), "{} are not what the kinds say; {help}", stale.join(", "));
}

/// Locks are the kernel's, and what is damaged is set aside or made again: nobody has to delete a
/// file to go on, so no message says so.
#[test]
fn nobody_is_told_to_delete_a_file() {
    let mut wrong = Vec::new();
    for (path, text) in sources(&["src"]) {
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("delete") || code.contains("rm -") || code.contains("stale lock") {
                wrong.push(format!("{path}:{}", i + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
