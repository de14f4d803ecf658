"""Compare a port's outputs with the expected ones and name the property that it most likely breaks.

`python check.py encoder OUTPUTS.safetensors`; README.md says more. Needs numpy and safetensors.
"""

# fmt: off
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ERRORS: dict = {  # property -> settings of `compute`, each a way to break it
    "window: one key too few": [{"wider": -1}],
    "window: one key too many": [{"wider": 1}],
    "window: ignored, local layers see everything": [{"wider": 10**6}],
    "causality: positions look into the future": [{"future": True}],
    "padding: is attended to": [{"padding": True}],
    "RoPE bases: global and local are swapped": [{"swap_bases": True}],
    "layer 0: has an attention norm, but must not": [{"norm_0": True}],
    "MLP: the halves of the GLU are swapped": [{"swap_halves": True}],
    "GELU: tanh approximation in place of erf": [{"tanh": True}],
    "norm epsilon: is another": [{"eps": eps} for eps in (1e-12, 1e-8, 1e-6, 1e-4, 1e-3)],
    "output bias: missing": [{"bias": False}],
    "head: its norm is missing": [{"head_norm": False}],
    "packing: positions do not restart, documents are read as one": [{"packed": True}],
}

def norm(x, weight, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight

def gelu(x, tanh):
    t, y = 1 / (1 + 0.3275911 * abs(x) / 2**0.5), 0  # erf to 1.5e-7: Abramowitz, Stegun 7.1.26
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = (y + c) * t
    erf = np.sign(x) * (1 - y * np.exp(-x * x / 2))
    return x * (1 + (np.tanh(0.7978845608 * (x + 0.044715 * x**3)) if tanh else erf)) / 2

def rotate(x, base):
    angles = np.arange(x.shape[1])[:, None] * base ** -np.linspace(0, 1, x.shape[-1] // 2, False)
    (a, b), sin, cos = np.split(x, 2, -1), np.sin(angles), np.cos(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

def compute(w, config, ids, real, document, **broken):  # one row: its tokens, 0 at padding, borders
    is_decoder, eps = "decoder" in config["model_type"], broken.get("eps", config["norm_eps"])
    left = config["local_attention"] // 2 - is_decoder + broken.get("wider", 0)
    heads, rope, tanh = config["num_attention_heads"], config["rope_parameters"], "tanh" in broken
    away = np.arange(len(ids))[None] - np.arange(len(ids))[:, None]  # key minus query
    seen = (real[None] == 1) | broken.get("padding", False) | (away == 0)
    seen = seen & ((document[None] == document[:, None]) | broken.get("packed", False))
    head, causal = ("lm_head.", away <= 0) if is_decoder else ("head.", True)
    seen = seen & (causal | broken.get("future", False))
    embedding = w["model.embeddings.tok_embeddings.weight"].astype(float)
    yield "embeddings", (x := norm(embedding[ids], w["model.embeddings.norm.weight"], eps))
    for i, kind in enumerate(config["layer_types"]):
        layer, kinds = f"model.layers.{i}.", ("full_attention", "sliding_attention")
        base = rope[kinds[kind == kinds[0]] if broken.get("swap_bases") else kind]["rope_theta"]
        y = norm(x, w.get(layer + "attn_norm.weight", 1), eps) if i or "norm_0" in broken else x
        names = ("q_proj", "k_proj", "v_proj") if is_decoder else ("Wqkv",)
        qkv = y @ np.concatenate([w[f"{layer}attn.{name}.weight"] for name in names]).T
        q, k, v = qkv.reshape(len(ids), 3, heads, -1).transpose(1, 2, 0, 3)
        scores = rotate(q, base) @ rotate(k, base).swapaxes(1, 2) / q.shape[-1] ** 0.5
        near = seen & (abs(away) <= left) if kind == kinds[1] else seen
        shares = np.exp(np.where(near, scores, -np.inf) - scores.max(-1, keepdims=True))
        y = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        x = x + y @ w[layer + "attn.Wo.weight"].T
        y = norm(x, w[layer + "mlp_norm.weight"], eps) @ w[layer + "mlp.Wi.weight"].T
        a, b = np.split(y, 2, -1)[:: -1 if broken.get("swap_halves") else 1]
        yield f"layers.{i}", (x := x + (gelu(a, tanh) * b) @ w[layer + "mlp.Wo.weight"].T)
    yield "final_norm", (x := norm(x, w["model.final_norm.weight"], eps))
    x = gelu(x @ w[head + "dense.weight"].T, tanh)
    yield "head", (x := norm(x, w[head + "norm.weight"], eps) if "head_norm" not in broken else x)
    yield "logits", x @ embedding.T + w["decoder.bias"] * broken.get("bias", True)

def distance(found, expected, real):  # the largest, as a share of what is usual
    a, b = found[real == 1].astype(float), expected[real == 1].astype(float)
    return np.inf if np.isnan(a).any() else abs(a - b).max() / (b * b).mean() ** 0.5

def main(kind: str, outputs: str, tolerance: str = "1e-4") -> int:
    folder, found, best = Path(__file__).parent / kind, load_file(outputs), (np.inf, "")
    w, inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("model", "inputs", "expected"))
    config = json.loads((folder / "config.json").read_text())
    names = {n: n.split("/") for n in expected if n in found}
    rows = {c: [inputs[f"{c}/{n}"] for n in ("input_ids", "attention_mask", "document")] for c, _ in names.values()}
    far = {n: distance(found[n], expected[n], rows[c][1]) for n, (c, _) in names.items()}
    wrong = [name for name in names if far[name] > float(tolerance)]
    print("PASS" if far and not wrong else "FAIL", f"{len(far)} of {len(expected)} compared",
          f"{len(wrong)} differ", *(f"{n} by {far[n]:.1e}" for n in wrong[:3]), sep="; ")
    for error, broken in [(e, b) for e in ERRORS if wrong for b in ERRORS[e]]:
        if config["model_type"] != "modernbert" or error.split(":")[0] != "causality":
            parts = {c: [dict(compute(w, config, *r, **broken)) for r in zip(*rows[c])] for c in rows}
            shares = [distance(found[n], np.stack([p[o] for p in parts[c]]), rows[c][1]) for n, (c, o) in names.items()]
            best = min(best, (max(shares), error))
    sure = "broken property" if best[0] <= float(tolerance) else "no known error; the nearest"
    print(f"{sure}: {best[1]} (which is {best[0]:.1e} away)" if wrong else "every output agrees")
    return int(bool(wrong) or not far)

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
