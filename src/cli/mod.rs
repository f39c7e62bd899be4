//! The roof: arguments, colours, tables, exit codes. The only floor that prints, reads the
//! environment or knows the table of kinds, the store, lineage and the engine at once.
//! stdout is data, stderr is for people.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the floor that prints")]

mod arguments;
mod environment;
mod error;
mod explain;
mod history;
mod inspect;
mod plan;
mod progress;
mod run;
mod session;
mod table;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

pub use inspect::{kinds_table, schemas};

use arguments::{Arguments, Command};
use environment::Environment;
use error::{Exit, Failure};

use crate::step::Kind;

/// The whole program, over a table of kinds: `flow::main(flow::kinds::ALL)`, or a slice of your
/// own. A custom binary built this way is its own worker.
pub fn main(kinds: &'static [Kind]) -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => {
            let code = if e.use_stderr() { Exit::Usage } else { Exit::Done };
            let shown = e.print();
            return if shown.is_ok() { code.into() } else { Exit::Internal.into() };
        }
    };
    let environment = Environment::read();
    let json = arguments.json;
    let plain = environment.plain() || !std::io::stderr().is_terminal();
    let stage = Stage { kinds, environment, json, plain, store: arguments.store.clone() };
    match dispatch(&stage, arguments.command) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.show(json, plain).into(),
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
        Command::Graph(options) => plan::graph(stage, &options),
        Command::Why(options) => explain::why(stage, &options),
        Command::Trace(options) => explain::trace(stage, &options),
        Command::Runs(options) => history::runs(stage, &options),
        Command::Show(options) => history::show(stage, &options),
        Command::Log(options) => history::log(stage, &options),
        Command::Kinds { kind } => inspect::kinds(stage, kind.as_deref()),
        Command::Schema { kind, write } => {
            inspect::schema(stage, kind.as_deref(), write.as_deref())
        }
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "flow", &mut std::io::stdout());
            Ok(Exit::Done)
        }
        Command::Worker { dir } => run::worker(stage, &dir),
    }
}
