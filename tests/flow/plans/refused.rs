//! What must be refused, and nothing beside it.

use std::time::{Duration, Instant};

use flow::pipeline::Settings;
use flow::source::Severity;

use super::{plan, plan_with, settings, told};

/// Errors of a pipeline, as `line:column message`, each with its help on the next line.
fn errors(text: &str) -> String {
    let mut found = plan(text).expect_err(text);
    found.retain(|d| d.severity == Severity::Error);
    let told = told(text, &found);
    told.lines().filter(|l| !l.starts_with("  at")).map(|l| format!("{l}\n")).collect()
}

const ROWS: &str = "  rows: { kind: fetch, with: { dataset: imdb } }\n";

#[test]
fn a_path_into_an_axis_that_leads_nowhere() {
    let into = |sweep: &str, reference: &str| {
        errors(&format!(
            "sweep: {sweep}\nsteps:\n{ROWS}  one: {{ kind: sample, with: {{ \
             data: \"${{steps.rows}}\", seed: \"${{sweep.{reference}}}\" }} }}\n"
        ))
    };
    let scalar = into("{ grid: { r: [4, 8] } }", "r.alpha");
    assert!(scalar.starts_with("4:62 axis `r` has no part `alpha`\n"), "{scalar}");
    assert!(scalar.contains("write `${sweep.r}`"), "{scalar}");
    assert_eq!(scalar.lines().count(), 2, "{scalar}");
    // One point of three lacks it.
    let sweep = "{ grid: { lora: [{ rank: 4 }, { rnak: 8 }] }, include: [{ other: 1 }] }";
    let map = into(sweep, "lora.rank");
    assert!(map.contains("axis `lora` has no part `rank`"), "{map}");
    assert!(map.contains("did you mean `rnak`?"), "{map}");
    let member = into("{ zip: { lora: { r: [4], alpha: [8] } } }", "lora.alpa");
    assert!(member.contains("unknown axis `lora.alpa`"), "{member}");
    assert!(member.contains("did you mean `lora.alpha`?"), "{member}");
}

#[test]
fn a_salt_that_is_not_a_word() {
    let text = format!(
        "params: {{ salts: [a, b], word: w, none: null }}\nsteps:\n\
         \x20 one: {{ kind: fetch, with: {{ dataset: x }}, salt: \"${{params.salts}}\" }}\n\
         \x20 two: {{ kind: fetch, with: {{ dataset: x }}, salt: \"${{params.word}}\" }}\n\
         \x20 nil: {{ kind: fetch, with: {{ dataset: x }}, salt: \"${{params.none}}\" }}\n{ROWS}"
    );
    let told = errors(&text);
    assert!(told.starts_with("3:51 expected text, a number or a boolean, found a list"), "{told}");
    assert_eq!(told.lines().count(), 2, "{told}");
}

#[test]
fn a_secret_of_another_step_in_the_key() {
    let text = "steps:\n  one: { kind: fetch, with: { dataset: x }, secrets: [TOKEN] }\n  \
                two: { kind: fetch, with: { dataset: y }, env: [TOKEN] }\n";
    assert!(errors(text).starts_with("3:51 `TOKEN` is a secret"), "{}", errors(text));
}

#[test]
fn keys_that_nobody_can_mean() {
    let text = r#"
params: { p: { "${params.x}": 1 } }
sweep: { grid: { v: [{ $input: 1 }] } }
steps:
  one:
    kind: command
    with: { run: ls, values: { $gather: 1, "${params.p}": 2, "$${x}": 3, p: "${params.p}" } }
"#;
    let told = errors(text);
    for wrong in [
        "2:16 a reference cannot stand in a key: `${params.x}`",
        "3:24 `$input` cannot be a key",
        "7:32 `$gather` cannot be a key",
        "7:44 a reference cannot stand in a key: `${params.p}`",
    ] {
        assert!(told.contains(wrong), "{told}");
    }
}

#[test]
fn an_unknown_parameter_in_a_sweep_is_one_mistake() {
    let text = format!(
        "params: {{ seeds: [1, 2] }}\nsweep: {{ grid: {{ seed: \"${{params.sedes}}\" }} }}\n\
         steps:\n{ROWS}  one: {{ kind: sample, with: {{ data: \"${{steps.rows}}\", \
         seed: \"${{sweep.seed}}\" }} }}\n"
    );
    let told = errors(&text);
    assert!(told.starts_with("2:25 unknown parameter `sedes`"), "{told}");
    assert_eq!(told.lines().count(), 2, "{told}");
}

#[test]
fn too_many_points_are_counted_before_they_are_made() {
    let axis: Vec<String> = (0..1000).map(|i| i.to_string()).collect();
    let axis = axis.join(", ");
    let sweep = |rest: &str| {
        format!(
            "sweep: {{ grid: {{ a: [{axis}], b: [{axis}] }}{rest} }}\nsteps:\n  one: {{ kind: \
             fetch, with: {{ dataset: \"${{sweep.a}}-${{sweep.b}}\" }} }}\n"
        )
    };
    let begun = Instant::now();
    assert!(errors(&sweep("")).contains("1000000 points, above its cap of 256"));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    // What is excluded does not count.
    let text = "sweep:\n  grid: { a: [1, 2, 3], b: [1, 2, 3] }\n  \
                exclude: [{ a: 1 }, { b: 1 }]\n  cap: 4\n\
                steps:\n  one: { kind: fetch, with: { dataset: \"${sweep.a}-${sweep.b}\" } }\n";
    assert_eq!(plan(text).unwrap().points.len(), 4);
    let small = Settings { sweep_cap: 3, ..settings() };
    let found = plan_with(&text.replace("  cap: 4\n", ""), &small).unwrap_err();
    assert!(found[0].message.contains("4 points, above its cap of 3"), "{found:?}");
    let negative = errors(&text.replace("cap: 4", "cap: -1"));
    assert!(negative.contains("expected a whole number, 1 or more, found the number -1"));
}

#[test]
fn an_axis_beside_its_own_part() {
    let text = format!(
        "sweep: {{ zip: {{ lora: {{ r: [4, 8] }} }}, include: [{{ lora: none }}] }}\n\
         steps:\n{ROWS}  \
         one: {{ kind: command, with: {{ run: ls, values: {{ x: \"${{sweep.lora}}\" }} }} }}\n"
    );
    let told = errors(&text);
    assert!(told.contains("axis `lora` cannot stand beside axis `lora.r`"), "{told}");
}

#[test]
fn a_variable_that_is_nearly_set() {
    let text = "steps: { one: { kind: fetch, with: { dataset: \"${env.TOKNE}\" } } }";
    assert!(errors(text).contains("did you mean `TOKEN`?"), "{}", errors(text));
}

/// Texts that are small and mean something huge: each is refused, at once and on a small stack.
#[test]
fn what_would_grow_without_end() {
    use std::fmt::Write as _;

    let step = "steps:\n  one: { kind: command, with: { run: \"x ${params.z}\" } }\n";
    let mut laughs = "params:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    let mut doubled = "params:\n  a0: xxxxxxxx\n".to_owned();
    let mut lists = "params:\n  a0: [1]\n".to_owned();
    for i in 1..40 {
        let before = i - 1;
        let aliases = vec![format!("*a{before}"); 10].join(", ");
        let _ = writeln!(laughs, "  a{i}: &a{i} [{aliases}]");
        let _ = writeln!(doubled, "  a{i}: \"${{params.a{before}}}${{params.a{before}}}\"");
        let _ = writeln!(lists, "  a{i}: [\"${{params.a{before}}}\", \"${{params.a{before}}}\"]");
    }
    let chain: String =
        (0..9000).map(|i| format!("  a{i}: \"${{params.a{}}}\"\n", i + 1)).collect();
    let chain = format!("params:\n{chain}  a9000: 1\n  z: \"${{params.a0}}\"\n{step}");
    let axis: Vec<String> = (0..2000).map(|n| n.to_string()).collect();
    let axis = axis.join(", ");
    let sweep = format!(
        "sweep:\n  cap: 18446744073709551615\n  grid: {{ a: [{axis}], b: [{axis}], c: [{axis}] }}\n\
         steps:\n  one:\n    kind: command\n    \
         with: {{ run: \"${{sweep.a}} ${{sweep.b}} ${{sweep.c}}\" }}\n"
    );
    let indented: String = (0..3000).map(|n| format!("{:n$}a:\n", "")).collect();
    let texts = [
        (format!("{laughs}  z: *a39\n{step}"), "not valid YAML"),
        (
            format!("{doubled}  z: \"${{params.a39}}\"\n{step}"),
            "parameters grow to more than 4 MiB",
        ),
        (format!("{lists}  z: \"${{params.a39}}\"\n{step}"), "parameters grow to more than 4 MiB"),
        (chain, "more than 64 parameters refer to each other in a row"),
        (sweep, "more than a million points"),
        ("[".repeat(100_000), "not valid YAML"),
        ("{a: ".repeat(100_000), "not valid YAML"),
        ("- ".repeat(100_000), "not valid YAML"),
        ("? ".repeat(100_000), "not valid YAML"),
        (indented, "not valid YAML"),
    ];
    // Half of what a program has. Sixty-four levels take 0.1 MB of it, and 3 MB where nothing is
    // optimised.
    let small = std::thread::Builder::new().stack_size(4 << 20);
    let check = move || {
        for (text, message) in texts {
            let told = errors(&text);
            assert!(
                told.contains(message),
                "{message}: {}",
                told.chars().take(300).collect::<String>()
            );
        }
    };
    small.spawn(check).unwrap().join().unwrap();
}
