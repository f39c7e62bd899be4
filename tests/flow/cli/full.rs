//! A disk that is really full: a tmpfs of a few megabytes, in a mount namespace of its own.

use std::fs;
use std::process::Command;

use super::{Project, err};

/// The second step does not say that it could not write all, and leaves room for a record; the
/// third says it.
const STEPS: &str = r#"
name: full
steps:
  small:
    kind: command
    with: { run: "echo small > ${out.a}", outputs: { a: a.txt } }
  careless:
    kind: command
    with:
      run: |
        head -c 60000 /dev/zero > pad
        yes | head -c 6000000 > ${out.a} 2>/dev/null || true
        rm pad
      outputs: { a: a.txt }
  honest:
    kind: command
    with: { run: "yes no | head -c 6000000 > ${out.a}", outputs: { a: a.txt } }
  fetched:
    kind: fetch
    with: { files: { train: rows.csv } }
"#;

/// Given the program. What each run says and how it ends is left in files.
const SCRIPT: &str = r#"
mount -t tmpfs -o size=4m tmpfs disk || exit 99
say() { "$flow" "$@" >"$name.out" 2>"$name.err"; echo $? >"$name.code"; }
name=careless; say run p.yaml careless
name=honest; say run p.yaml honest
name=again; say run p.yaml --keep-going
name=verified; say verify
mount -o remount,size=64m disk || exit 99
name=roomy; say run p.yaml --record
name=unchanged; say run p.yaml
"#;

#[test]
#[ignore = "needs a mount namespace (`unshare -rm`); `.ci/run` starts it where there is one"]
fn a_full_disk_poisons_nothing() {
    let project = Project::new(STEPS);
    let rows: String = (0..20_000).map(|i| format!("{i} {}\n", i * 7919 % 10_007)).collect();
    project.write("rows.csv", &format!("text\n{rows}"));
    let plain = project.flow(&["--store", "plain", "run", "p.yaml", "--record"]);
    assert_eq!(plain.status.code(), Some(0), "{}", err(&plain));
    let results = fs::read_to_string(project.path("p.results")).unwrap();
    fs::remove_file(project.path("p.results")).unwrap();
    project.write("flow.toml", "store = \"disk/store\"\n");
    fs::create_dir(project.path("disk")).unwrap();

    let mut shell = Command::new("unshare");
    shell.args(["-rm", "sh", "-c", SCRIPT]).env("flow", env!("CARGO_BIN_EXE_flow"));
    shell.env_remove("FLOW_STORE").current_dir(project.dir.path());
    let done = shell.output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{}", err(&done));
    let read = |name: &str| fs::read_to_string(project.path(name)).unwrap();
    for name in ["careless", "honest", "again"] {
        let (code, said) = (read(&format!("{name}.code")), read(&format!("{name}.err")));
        assert!(matches!(code.trim(), "1" | "3"), "{name}: {code} {said}");
        assert!(said.contains("disk is full") || said.contains("No space left"), "{said}");
    }
    assert_eq!(read("verified.code"), "0\n", "{} {}", read("verified.out"), read("verified.err"));
    assert_eq!(read("roomy.code"), "0\n", "{}", read("roomy.err"));
    assert_eq!(read("p.results"), results, "what was made with room on another disk");
    assert!(read("unchanged.err").contains("0 ran, 4 from the cache"), "{}", read("unchanged.err"));
}
