"""The works of training.rs in PyTorch, transformers and PEFT, f32 or bf16 autocast: same weights and rows.

Started by `cargo bench --bench training -- --peer PYTHON`; prints one line of JSON.
Needs: pip install torch transformers peft
"""
import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(1)
work = json.load(open(f"{folder}/work.json"))
rows = json.load(open(f"{folder}/rows.json"))
auto = AutoModelForCausalLM if work["causal"] else AutoModelForSequenceClassification
model = auto.from_pretrained(folder, dtype=torch.float32)
if work["method"] == "lora":
    model = get_peft_model(model, LoraConfig(
        r=work["r"], lora_alpha=2 * work["r"], lora_dropout=0.05, target_modules=work["targets"],
        task_type="CAUSAL_LM" if work["causal"] else "SEQ_CLS"))


def batch(part):
    length = work["length"]
    pad = lambda xs, x: xs + [x] * (length - len(xs))
    out = {
        "input_ids": torch.tensor([pad(r["ids"], 0) for r in part]),
        "attention_mask": torch.tensor([pad([1] * len(r["ids"]), 0) for r in part]),
    }
    if work["causal"]:
        out["labels"] = torch.tensor([pad(r["labels"], -100) for r in part])
    else:
        out["labels"] = torch.tensor([r["class"] for r in part])
    return out


def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


infer = work["method"] == "infer"
model.train(not infer)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
autocast = torch.autocast("cpu", torch.bfloat16, enabled=work["bf16"])
seconds, start = [], 0.0
for i in range(work["steps"] + 1):
    part = rows[i * work["batch"]:(i + 1) * work["batch"]]
    if i == 1:
        start = cpu()
    begin = time.perf_counter()
    if infer:
        with torch.inference_mode(), autocast:
            model(**batch(part)).logits.sum().item()
    else:
        with autocast:
            loss = model(**batch(part)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - begin)
timed = sorted(seconds[1:])
print(json.dumps({
    "seconds": timed[len(timed) // 2],
    "cpu_seconds": (cpu() - start) / len(timed),
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
