//! Folders that one command has after another.

use std::fmt::Write as _;
use std::fs;

use super::{Project, err};

/// What commands do before they look around, one after the other.
const DEEDS: [&str; 11] = [
    "true",
    "true",
    "mkdir -p deep/er \"$TMPDIR/x\" && touch deep/er/a .b ../c \"$TMPDIR/x/d\" ../out/e",
    "rm ../out/e",
    "echo spoilt > inputs/1/i/i",
    "chmod 0711 .",
    "true",
    "mkdir deep && mv inputs/1/i deep && rmdir ../scratch/inputs/1/* ; mkdir -p inputs/1/i",
    // It is in no group that could be ended with the command's, and comes too late.
    "(setsid sh -c 'sleep 0.3; touch late ../late ../out/i/late ../out/list/late' \
     </dev/null >/dev/null 2>&1 &)",
    "sleep 0.6",
    "true",
];

/// Each writes down the number of its folder and all that it sees in it.
fn pipeline() -> String {
    let mut text = String::from("name: rooms\nsteps:\n");
    let mut outputs = String::from("outputs:\n");
    for (i, deed) in DEEDS.iter().enumerate() {
        let before = i.checked_sub(1).map_or("true".into(), |b| format!("ls ${{steps.s{b}}}"));
        // What is left in `out` beside its ports would fail the step.
        let undo = if deed.contains("../out/e") { "rm -f ../out/e" } else { "true" };
        writeln!(text, "  s{i}:\n    kind: command\n    with:").unwrap();
        writeln!(text, "      run: |\n        {before} >/dev/null").unwrap();
        writeln!(text, "        seen=$(find .. -mindepth 1 | LC_ALL=C sort)").unwrap();
        writeln!(text, "        echo \"$seen\" > ${{out.list}}").unwrap();
        writeln!(text, "        stat -c %i . > ${{out.i}}").unwrap();
        writeln!(text, "        {deed}\n        {undo}").unwrap();
        writeln!(text, "      outputs: {{ i: i, list: list }}").unwrap();
        writeln!(outputs, "  s{i}: \"${{steps.s{i}}}\"").unwrap();
    }
    text + &outputs
}

#[test]
fn a_command_finds_nothing_of_another_in_its_folder() {
    let project = Project::new(&pipeline());
    let run = project.flow(&["run", "p.yaml", "--jobs", "1"]);
    assert_eq!(run.status.code(), Some(0), "{}", err(&run));
    let read = |i: usize, port: &str| {
        let path = project.path(&format!("outputs/rooms/s{i}/{port}/{port}"));
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let seen: Vec<String> = (0..DEEDS.len()).map(|i| read(i, "list")).collect();
    let own = "../out\n../out/i\n../out/list\n../scratch\n";
    let inputs = "../scratch/inputs\n../scratch/inputs/1\n../scratch/inputs/1/i\n\
                  ../scratch/inputs/1/i/i\n../scratch/inputs/1/list\n\
                  ../scratch/inputs/1/list/list\n";
    assert_eq!(seen[0], own);
    for seen in &seen[1..] {
        assert_eq!(*seen, format!("{own}{inputs}"));
    }
    let folders: Vec<String> = (0..DEEDS.len()).map(|i| read(i, "i")).collect();
    let again: Vec<bool> = folders.windows(2).map(|pair| pair[0] == pair[1]).collect();
    // Not after a mode was changed, nor while a process is left.
    let want = [true, true, true, true, true, false, true, true, false, false];
    assert_eq!(again, want, "{folders:?}");
    assert_eq!(fs::read_dir(project.path(".flow/attempts")).unwrap().count(), 0);
}
