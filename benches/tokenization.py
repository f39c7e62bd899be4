"""The works of tokenization.rs with `datasets.map(batched=True)` and a fast tokenizer.

Started by `cargo bench --bench tokenization -- --peer PYTHON`; prints one line of JSON. The time is
of loading the tokenizer, mapping and writing Parquet; reading the rows into Arrow goes before it.
Needs: pip install datasets transformers tokenizers pyarrow
"""
import json
import os
import resource
import sys
import tempfile
import time

work = json.loads(sys.argv[1])
os.environ["TOKENIZERS_PARALLELISM"] = "true" if work["processes"] == 1 else "false"
os.environ["RAYON_NUM_THREADS"] = str(work["threads"])
import datasets
from transformers import PreTrainedTokenizerFast

datasets.disable_progress_bars()
with tempfile.TemporaryDirectory() as cache:
    rows = datasets.load_dataset("parquet", data_files=work["rows"], split="train", cache_dir=cache)
    start, cpu = time.perf_counter(), time.process_time()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=work["tokenizer"])

    def encode(batch):
        made = tokenizer(batch["text"], truncation=True, max_length=work["max_length"],
                         padding=False, return_attention_mask=False, return_token_type_ids=False)
        if work["form"] != "classification":
            made["labels"] = made["input_ids"]
        return made

    processes = work["processes"] if work["processes"] > 1 else None
    made = rows.map(encode, batched=True, remove_columns=["text"], num_proc=processes)
    made.to_parquet(work["out"])
    seconds = time.perf_counter() - start
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({
        "seconds": seconds,
        "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in use),
        "peak_rss_bytes": sum(u.ru_maxrss for u in use) * 1024,
        "file_bytes": os.path.getsize(work["out"]),
    }))
