//! `tokenize`: prompts and texts become token ids.

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::artifact::{Candidate, Prompts, PromptsInfo, ROWS, TokenizerFiles, TokensInfo, Type};
use crate::digest::Digest;
use crate::source::Fault;
use crate::step::{Context, Input, Needs, Ports, Problem, StepKind};
use crate::text::{
    Chunks, Encoder, Limits, Task, Tokenized, Tokenizer, TokenizerSource, TooLong, Truncate,
    tokenize_file,
};

/// Turns rendered rows into token ids, in Parquet, with labels on the target only.
///
/// The prompt is one string to the tokenizer, as it is in use; the target is encoded as it
/// stands after it, as in transformers (by itself where the prompt's tokens would differ), and
/// ends with the end-of-sequence token. The beginning-of-sequence token stands once where the
/// tokenizer puts one. `truncate: input` shortens the row's input and never the template or the
/// target, so that a long row keeps its question and its answer; what still does not fit is left
/// out and counted. Where targets are label words, every row keeps room for the longest word.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Tokenize {
    /// The rendered rows.
    data: Input<Prompts>,
    /// The tokenizer, `${steps.base.tokenizer}`.
    tokenizer: Input<TokenizerFiles>,
    /// Most tokens of a row.
    max_length: usize,
    /// What happens to longer rows. If not given, `input` for prompts, and `right` for
    /// classification and for rows that are nothing but target (`completion` without `input`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    truncate: Option<Truncate>,
    /// What happens to rows that are too long even without their input.
    #[serde(default)]
    on_too_long: TooLong,
    /// Whether the end-of-sequence token follows the target.
    #[serde(default = "yes")]
    append_eos: bool,
}

fn yes() -> bool {
    true
}

/// The tokenizer of an artifact.
pub(super) fn load_tokenizer(files: &TokenizerFiles) -> Result<Tokenizer> {
    let find = |name: &str| files.0.find("tokenizer", name);
    Tokenizer::load(&TokenizerSource {
        tokenizer: files.tokenizer()?,
        config: files.config()?,
        special_tokens_map: find("special_tokens_map.json")?,
        chat_template: find("chat_template.jinja")?,
    })
}

impl StepKind for Tokenize {
    const NAME: &'static str = "tokenize";
    const VERSION: u32 = 2;

    fn ports(&self) -> Ports {
        Ports::like(Type::Tokens, self.data.names().as_deref())
    }

    fn check(&self) -> Vec<Problem> {
        if self.max_length < 2 {
            let help = "a row needs a token to predict from and one to predict";
            return vec![Problem::error("max_length", "less than 2 tokens").help(help)];
        }
        Vec::new()
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let tokenizer = load_tokenizer(&cx.open(&self.tokenizer)?)?;
        for split in data.splits() {
            let (_, info) = data.split(split)?;
            self.encoder(tokenizer.clone(), &info)?;
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        Needs::ALL
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let tokenizer = load_tokenizer(&cx.open(&self.tokenizer)?)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(cx.threads.max(1)).build()?;
        let splits: Vec<String> = data.splits().map(str::to_owned).collect();
        let (mut chunks, mut encoded) = (0, 0);
        for name in &splits {
            let (rows, info) = data.split(name)?;
            let task = task_of(&info)?;
            let encoder = self.encoder(tokenizer.clone(), &info)?;
            let dir = cx.out_dir(name)?;
            let made = {
                let cx = &*cx;
                let mut progress = |done, total| {
                    cx.progress(done, total, "rows", name.as_str());
                    cx.stop()
                };
                let out = dir.join(ROWS);
                let salt = self.salt(&cx.open(&self.tokenizer)?, &info)?;
                let memos = cx.memos(&salt);
                let keep = Chunks { salt, keep: &|key, make| cx.memo(&memos, key, make) };
                pool.install(|| tokenize_file(&rows, &out, &encoder, task, &keep, &mut progress))
                    .with_context(|| format!("split `{name}`"))?
            };
            if made.rows == 0 && info.rows > 0 {
                let message = format!("no row of `{name}` is left: {}", left_out(&made));
                return Err(Fault::new(message).help(help(&made)).into());
            }
            let candidates = info.candidates.iter().zip(encoder.candidates());
            let tokens = TokensInfo {
                task: info.task.clone(),
                rows: made.rows,
                truncated: made.truncated,
                dropped: made.left_out(),
                tokens: made.tokens,
                target_tokens: made.target_tokens,
                longest: made.longest,
                max_length: self.max_length as u64,
                vocab_size: tokenizer.vocab_size() as u64,
                pad_id: tokenizer.pad_id(),
                eos_id: tokenizer.eos_id(),
                end_ids: made.ends.iter().copied().collect(),
                bos_id: tokenizer.bos_id().filter(|_| task == Task::CausalLm),
                tokenizer: Some(cx.open(&self.tokenizer)?.0.port("tokenizer")?),
                candidates: candidates
                    .map(|(word, ids)| Candidate { word: word.clone(), ids: ids.to_vec() })
                    .collect(),
                classes: info.classes.clone(),
            };
            cx.write_json(&dir, "tokens.json", &tokens)?;
            cx.write_json(&dir, "samples.json", &made.samples)?;
            report(cx, name, &made);
            (chunks, encoded) = (chunks + made.chunks, encoded + made.encoded);
            if info.special_tokens && made.without_bos > 0 {
                let bos = tokenizer.bos_id().map(|id| tokenizer.token(id)).unwrap_or_default();
                cx.warn(format!(
                    "{} of {} rows of `{name}` do not begin with `{bos}`, which the tokenizer puts \
                     before a text: the chat template does not write it",
                    made.without_bos, made.rows
                ));
            }
        }
        cx.fact("chunks", format!("{encoded} of {chunks} tokenized"));
        Ok(())
    }
}

impl Tokenize {
    /// All that decides, beside the rows, what becomes of them.
    fn salt(&self, tokenizer: &TokenizerFiles, info: &PromptsInfo) -> Result<Digest> {
        let salt = json!({
            "version": Self::VERSION,
            "tokenizer": tokenizer.0.port("tokenizer")?,
            "max_length": self.max_length,
            "truncate": self.truncate,
            "on_too_long": self.on_too_long,
            "append_eos": self.append_eos,
            "special_tokens": info.special_tokens,
            "candidates": info.candidates,
            "candidate_targets": info.candidate_targets,
            "candidate_prompt": info.candidate_prompt,
        });
        Ok(Digest::of_value("flow/tokenize/chunk", &salt)?)
    }

    fn encoder(&self, tokenizer: Tokenizer, info: &PromptsInfo) -> Result<Encoder> {
        let causal = task_of(info)? == Task::CausalLm;
        let limits = Limits {
            max_length: self.max_length,
            truncate: self.truncate,
            on_too_long: self.on_too_long,
            append_eos: self.append_eos && causal,
            special_tokens: info.special_tokens,
        };
        let encoder = Encoder::new(tokenizer, limits)?;
        let (words, targets) = (&info.candidates, &info.candidate_targets);
        encoder.with_candidates(words, targets, &info.candidate_prompt)
    }
}

fn task_of(info: &PromptsInfo) -> Result<Task> {
    Task::of_name(&info.task).with_context(|| format!("`{}` is no task", info.task))
}

fn left_out(made: &Tokenized) -> String {
    let mut parts = Vec::new();
    if made.too_long > 0 {
        parts.push(format!("{} are too long", made.too_long));
    }
    if made.no_target > 0 {
        parts.push(format!("{} have nothing to learn", made.no_target));
    }
    for (part, rows) in &made.second_bos {
        parts.push(format!("the {part} of {rows} begins with a second BOS"));
    }
    parts.join(", ")
}

/// What to do about most of the rows that were left out.
fn help(made: &Tokenized) -> &'static str {
    let second_bos = made.second_bos.values().sum::<u64>();
    if made.too_long >= made.no_target.max(second_bos) {
        "raise `max_length`"
    } else if made.no_target >= second_bos {
        "see whether `output` of the format step names the column of the answers, and, with \
         `truncate: right`, whether `max_length` reaches them"
    } else {
        "take the beginning-of-sequence token out of the data; the tokenizer puts one by itself"
    }
}

fn report(cx: &mut Context<'_>, split: &str, made: &Tokenized) {
    cx.fact(&format!("rows.{split}"), made.rows);
    cx.fact(&format!("tokens.{split}"), made.tokens);
    if made.target_tokens > 0 {
        cx.fact(&format!("target_tokens.{split}"), made.target_tokens);
    }
    if made.truncated > 0 {
        cx.fact(&format!("truncated.{split}"), made.truncated);
        cx.warn(format!("{} of {} rows of `{split}` were shortened", made.truncated, made.rows));
    }
    if made.left_out() > 0 {
        cx.fact(&format!("dropped.{split}"), made.left_out());
        cx.warn(format!("rows of `{split}` were left out: {}", left_out(made)));
    }
}
