//! How long a step takes; run by hand.

use std::path::Path;
use std::time::Instant;

use flow::learn::{Batch, Labels, LoraConfig, Method, Model};

use super::{classes, files, lora, setup};

/// One LoRA step of MiniLM's shape (6 layers of 384), 16 rows of 128 tokens.
#[test]
#[ignore = "needs the built hub, named by FLOW_TEST_HUB"]
fn minilm_step() {
    let hub = std::env::var("FLOW_TEST_HUB").unwrap();
    let dir = Path::new(&hub).join("models/local/minilm-l6-distilbert");
    let files = files(dir.join("config.json"), dir.join("model.safetensors"));
    let ids: Vec<u32> = (0..16 * 128).map(|i| 1000 + (i * 37) % 20_000).collect();
    let batch = Batch {
        input_ids: ids,
        token_type_ids: None,
        lengths: vec![128; 16],
        size: 16,
        length: 128,
        labels: Labels::Classes((0..16).map(|i| i % 2).collect()),
    };
    let adapter = LoraConfig { dropout: 0.05, ..lora(&["q_lin", "v_lin"]) };
    for (method, lora) in [
        (Method::Full, None),
        (Method::Lora, Some(adapter.clone())),
        (Method::Qlora, Some(adapter)),
    ] {
        let model = Model::load(&files, &setup(classes(2), method, lora)).unwrap();
        model.gradients(&batch, 0, 16.0).unwrap();
        let start = Instant::now();
        for step in 1..4 {
            let (loss, _) = model.gradients(&batch, step, 16.0).unwrap();
            assert!(loss.is_finite());
        }
        println!("{method:?}: {:.3} s a step", start.elapsed().as_secs_f64() / 3.0);
        let start = Instant::now();
        model.logits(&batch).unwrap();
        println!("{method:?}: {:.3} s a forward pass", start.elapsed().as_secs_f64());
    }
}
