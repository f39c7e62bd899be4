//! A command as a line that a shell reads back as it was.

/// Words that stand as they are; all others are quoted.
fn is_plain(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:,=@%+".contains(c);
    !word.is_empty() && word.chars().all(plain)
}

/// The words, each quoted where it has to be.
pub(super) fn line(words: &[String]) -> String {
    let quoted = words.iter().map(|word| match is_plain(word) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_it_back() {
        let words =
            ["flow", "run", "a b.yaml", "--set", "params.x=[1, 'two', \"$3\"]", "", "~", "*"];
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let script = format!("printf '%s\\n' {}", line(&words));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let read = String::from_utf8(output.stdout).unwrap();
        assert_eq!(read.lines().collect::<Vec<_>>(), words);
        assert_eq!(line(&words[..2]), "flow run");
    }
}
