"""The GPT of examples/gpt_small in plain PyTorch: serves steps to gpt_compare.py, on lines of text.

It reads a command a line from stdin ("curve", or "time STEPS") and answers with a line of JSON.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class GPT(nn.Module):
    """The model; its parameters have the names, shapes and column order of txcore's."""

    def __init__(self, arrays, config):
        super().__init__()
        self.config = config
        self.weights = nn.ParameterDict(
            {name.replace("/", "_"): nn.Parameter(torch.tensor(a)) for name, a in arrays.items()}
        )
        half = config["width"] // config["heads"] // 2
        angles = torch.arange(config["length"])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.cos, self.sin = angles.cos(), angles.sin()

    def rotate(self, x):
        """Turn (batch, heads, length, features) by the tokens' places."""
        a, b = x.chunk(2, -1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, tokens, labels):
        """Return the mean loss."""
        c, w = self.config, self.weights
        rows, length = tokens.shape
        features, shared = c["width"] // c["heads"], c["heads"] // c["kv_heads"]
        x = F.embedding(tokens, w["embedding"])
        for i in range(c["layers"]):
            h = F.rms_norm(x, (c["width"],), w["blocks_norm1"][i], 1e-6)
            made = h @ w["blocks_qkv"][i]
            made = made.view(rows, length, c["kv_heads"], shared + 2, features)
            q = made[..., :shared, :].reshape(rows, length, c["heads"], features).transpose(1, 2)
            k, v = (made[..., shared + n, :].transpose(1, 2) for n in (0, 1))
            out = F.scaled_dot_product_attention(
                self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=shared > 1
            )
            x = x + out.transpose(1, 2).reshape(rows, length, c["width"]) @ w["blocks_out"][i]
            h = F.rms_norm(x, (c["width"],), w["blocks_norm2"][i], 1e-6)
            x = x + F.gelu(h @ w["blocks_up"][i], approximate="tanh") @ w["blocks_down"][i]
        logits = F.rms_norm(x, (c["width"],), w["norm"], 1e-6) @ w["head"]
        return F.cross_entropy(logits.float().view(-1, c["vocabulary"]), labels.view(-1))


def main(path, threads, precision, compiled):
    """Serve."""
    torch.set_num_threads(int(threads))
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays.pop("config")))
    batches = [torch.from_numpy(arrays.pop(key).astype(np.int64)) for key in ("tokens", "labels")]
    rate = float(arrays.pop("rate"))
    model = GPT(arrays, config)
    run = torch.compile(model) if compiled == "compiled" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )

    def step(i):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = run(batches[0][i % len(batches[0])], batches[1][i % len(batches[1])])
        loss.backward()
        optimizer.step()
        return loss.item()

    print("ready", flush=True)
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        if command == "curve":
            print(json.dumps([step(i) for i in range(len(batches[0]))]), flush=True)
            continue
        started = time.process_time()
        for i in range(int(count)):
            step(i)
        print(json.dumps((time.process_time() - started) / int(count)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
