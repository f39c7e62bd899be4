//! The roof: arguments, colours, tables, exit codes. The only floor that prints, reads the
//! environment or knows the table of kinds, the store, lineage and the engine at once.
//! stdout is data, stderr is for people.

#[macro_use]
mod out;

mod arguments;
mod compare;
mod diff;
mod environment;
mod error;
mod explain;
mod gc;
mod history;
mod import;
mod inspect;
mod named;
mod pin;
mod plan;
mod progress;
mod project;
mod reproduce;
mod run;
mod samples;
mod session;
mod shell;
mod sketch;
mod steps;
mod table;
mod verify;

use std::io::{ErrorKind, IsTerminal};
use std::panic::{UnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::CommandFactory;

pub use inspect::{kinds_table, schemas};

use arguments::{Arguments, Command};
use environment::Environment;
use error::{Exit, Failure};

use crate::step::Kind;

/// The whole program, over a table of kinds: `flow::main(flow::kinds::ALL)`, or a slice of your
/// own. A custom binary built this way is its own worker.
pub fn main(kinds: &'static [Kind]) -> ExitCode {
    guarded(|| start(kinds)).into()
}

/// A panic is a mistake of the program, and has an exit code of its own.
fn guarded(work: impl FnOnce() -> Exit + UnwindSafe) -> Exit {
    catch_unwind(work).unwrap_or_else(|_| {
        errln!("error: this is a mistake of flow itself; please report what stands above");
        Exit::Internal
    })
}

fn start(kinds: &'static [Kind]) -> Exit {
    let arguments = match Arguments::read() {
        Ok(arguments) => arguments,
        Err(e) => {
            // There are no arguments to ask yet.
            if e.use_stderr() && std::env::args().any(|argument| argument == "--json") {
                return Failure::misused(&e).show(true, true);
            }
            return match e.print() {
                Err(e) if e.kind() != ErrorKind::BrokenPipe => Exit::Internal,
                _ if e.use_stderr() => Exit::Usage,
                _ => Exit::Done,
            };
        }
    };
    let environment = Environment::read();
    let json = arguments.json;
    let plain = environment.plain() || !std::io::stderr().is_terminal();
    let stage = Stage { kinds, environment, json, plain, store: arguments.store.clone() };
    match dispatch(&stage, arguments.command) {
        Ok(exit) => exit,
        Err(failure) => failure.show(json, plain),
    }
}

/// What every command stands on.
struct Stage {
    kinds: &'static [Kind],
    environment: Environment,
    json: bool,
    plain: bool,
    store: Option<std::path::PathBuf>,
}

fn dispatch(stage: &Stage, command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Run(options) => run::run(stage, &options),
        Command::Plan(options) => plan::plan(stage, &options),
        Command::Validate(options) => plan::validate(stage, &options),
        Command::Update(options) => run::update(stage, options),
        Command::Graph(options) => plan::graph(stage, &options),
        Command::Why(options) => explain::why(stage, &options),
        Command::Trace(options) => explain::trace(stage, &options),
        Command::Runs(options) => history::runs(stage, &options),
        Command::Show(options) => history::show(stage, &options),
        Command::Diff(options) => diff::diff(stage, &options),
        Command::Compare(options) => compare::compare(stage, &options),
        Command::Reproduce(options) => reproduce::reproduce(stage, options),
        Command::Log(options) => history::log(stage, &options),
        Command::Gc(options) => gc::gc(stage, &options),
        Command::Pin(options) => pin::pin(stage, &options),
        Command::Verify(options) => verify::verify(stage, &options),
        Command::Import(options) => import::import(stage, &options),
        Command::Kinds { kind } => inspect::kinds(stage, kind.as_deref()),
        Command::Schema { kind, write } => {
            inspect::schema(stage, kind.as_deref(), write.as_deref())
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut <Arguments>::command(), "flow", &mut script);
            let script = String::from_utf8_lossy(&script);
            if stage.json {
                let shell = shell.to_string();
                outln!("{}", serde_json::json!({ "shell": shell, "script": script }))?;
            } else {
                out::text(&script)?;
            }
            Ok(Exit::Done)
        }
        Command::Worker { dir } => run::worker(stage, &dir),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_has_an_exit_code() {
        assert_eq!(guarded(|| panic!("this one is expected")), Exit::Internal);
        assert_eq!(guarded(|| Exit::Done), Exit::Done);
    }
}
