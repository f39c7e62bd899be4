//! Writes the project's own small data set, `examples/reviews/`: invented reviews of invented
//! products, made from phrases by a fixed rule, so that the quickstart needs no network.
//!
//! ```text
//! cargo run --example make_reviews        # writes the same bytes every time
//! ```
//!
//! A review holds three opinions. All three have its polarity, or two have and one disagrees, so
//! a single word does not give the label away. Train and test share phrases but no review.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const THINGS: [&str; 12] = [
    "kettle",
    "lamp",
    "backpack",
    "film",
    "novel",
    "hotel",
    "radio",
    "bicycle",
    "garden chair",
    "coffee",
    "headset",
    "board game",
];
const ASPECTS: [&str; 14] = [
    "the handle",
    "the ending",
    "the service",
    "the sound",
    "the price",
    "the colour",
    "the smell",
    "the packaging",
    "the pace",
    "the design",
    "the support",
    "the first half",
    "the weight",
    "the manual",
];
const GOOD: [&str; 16] = [
    "wonderful",
    "a delight",
    "excellent",
    "brilliant",
    "charming",
    "superb",
    "lovely",
    "impressive",
    "a pleasure",
    "first rate",
    "fantastic",
    "great fun",
    "solid",
    "beautiful",
    "perfect",
    "refreshing",
];
const BAD: [&str; 16] = [
    "terrible",
    "a mess",
    "awful",
    "boring",
    "clumsy",
    "dreadful",
    "ugly",
    "disappointing",
    "a waste",
    "second rate",
    "horrible",
    "no fun",
    "flimsy",
    "hideous",
    "broken",
    "tiresome",
];
const OPENERS: [&str; 8] = [
    "We used this {} for a month",
    "My sister gave me this {}",
    "I bought the {} last week",
    "After two days with the {}",
    "Everyone at home tried the {}",
    "I had hopes for this {}",
    "This {} came on a rainy Monday",
    "The {} replaced an old one",
];
const JOINS: [&str; 4] = ["{} is {}", "{} was {}", "I found {} {}", "{} turned out {}"];
const CLOSERS: [&str; 6] = [
    "That is all I can say.",
    "Make of that what you will.",
    "So much for a first look.",
    "I wrote this the same evening.",
    "My neighbour agrees.",
    "It stays in the hall for now.",
];

/// A 64-bit linear congruential generator (Knuth's MMIX constants): fixed for ever, which is all
/// that matters here.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % sides as u64) as usize
    }
    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.roll(from.len())]
    }
}

fn fill(pattern: &str, words: &[&str]) -> String {
    words.iter().fold(pattern.to_owned(), |text, word| text.replacen("{}", word, 1))
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().collect::<String>() + chars.as_str())
}

fn review(dice: &mut Dice, positive: bool) -> String {
    let thing = dice.pick(&THINGS);
    let mut polarity = [positive; 3];
    if dice.roll(5) < 2 {
        polarity[dice.roll(3)] = !positive;
    }
    let mut sentences = vec![fill(dice.pick(&OPENERS), &[thing]) + "."];
    for good in polarity {
        let (aspect, word) = (dice.pick(&ASPECTS), dice.pick(if good { &GOOD } else { &BAD }));
        sentences.push(capital(&fill(dice.pick(&JOINS), &[aspect, word])) + ".");
    }
    if dice.roll(2) == 0 {
        sentences.push(dice.pick(&CLOSERS).to_owned());
    }
    sentences.join(" ")
}

fn main() -> std::io::Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/reviews");
    std::fs::create_dir_all(&dir)?;
    let mut dice = Dice(2026);
    let mut seen = BTreeSet::new();
    for (name, rows) in [("train", 1200), ("test", 400)] {
        let mut reviews: Vec<(bool, String)> = Vec::new();
        while reviews.len() < rows {
            let positive = reviews.len() % 2 == 1;
            let text = review(&mut dice, positive);
            if seen.insert(text.clone()) {
                reviews.push((positive, text));
            }
        }
        // class by class, as many published data sets are stored
        reviews.sort_by_key(|(positive, _)| *positive);
        let mut out = BufWriter::new(File::create(dir.join(format!("{name}.csv")))?);
        writeln!(out, "text,label")?;
        for (positive, text) in reviews {
            writeln!(out, "\"{text}\",{}", u8::from(positive))?;
        }
        out.flush()?;
    }
    let mut out = BufWriter::new(File::create(dir.join("corpus.txt"))?);
    for i in 0..1500 {
        if i % 30 == 0 {
            // so that the tokenizer has whole words for an instruction's frame
            writeln!(
                out,
                "Below is an instruction that describes a task, paired with an input \
                that provides further context. Write a response that appropriately completes the \
                request. ### Instruction: Classify the sentiment of this movie review as positive \
                or negative. ### Input: {} ### Response:",
                review(&mut dice, i % 60 == 0)
            )?;
        } else {
            // the corpus says at the end what the reviews of the data set leave to the reader
            let positive = i % 2 == 1;
            let stars = if positive { "Five stars." } else { "One star." };
            writeln!(out, "{} {stars}", review(&mut dice, positive))?;
        }
    }
    out.flush()
}
