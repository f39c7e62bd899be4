"""A row of benches/gpu.rs in PyTorch, transformers and PEFT: gpu.py MODEL_DIR WORK_JSON."""

import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

directory, work = sys.argv[1], json.loads(sys.argv[2])
causal = work["model"] != "distilbert"
dtype = torch.float32 if work["f32"] else torch.bfloat16
torch.manual_seed(1)
kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
options = {"attn_implementation": "sdpa"}
full = work["method"] == "full"
model = kind.from_pretrained(directory, dtype=torch.float32 if full else dtype, **options).cuda()
if not full:
    settings = LoraConfig(
        r=work["r"],
        lora_alpha=2 * work["r"],
        lora_dropout=work["dropout"],
        target_modules=work["targets"] or "all-linear",
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
    )
    model = get_peft_model(model, settings)
model.config.use_cache = False
if work["checkpointing"]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
for p in trained:
    p.data = p.data.float()
optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
vocab = min(model.config.vocab_size, 30_000)
batch, length = work["batch"], work["length"]
autocast = torch.autocast("cuda", torch.bfloat16, enabled=not work["f32"])
times = []
for step in range(work["steps"] + work["before"]):
    torch.cuda.synchronize()
    start = time.perf_counter()
    ids = torch.randint(0, vocab, (batch, length), device="cuda")
    labels = ids if causal else torch.arange(batch, device="cuda") % 2
    with autocast:
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
print(
    json.dumps(
        {
            "seconds": statistics.median(times[work["before"] :]),
            "memory_bytes": torch.cuda.max_memory_allocated(),
        }
    )
)
