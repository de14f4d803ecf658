"""Rebuild the initial weights of a run by docs/order.md, section 8, from its START record alone.

python tests/independent/weights.py RUN_DIR WEIGHTS.npz [--tensor NAME]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from order import GAMMA, WORD, key, mix
from record import read_ledger

NORMAL, UNIFORM = 3, 4
# AS 241: numerator and denominator of each range, the constant term first.
CENTRAL = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
     1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
     3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
     5.2264952788528545610e3),
)  # fmt: skip
MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
     3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
     2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
     1.05075007164441684324e-9),
)  # fmt: skip


def hash_name(name: str) -> int:
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % WORD
    return mix(h)


def units(seed: int, purpose: int, name: str, count: int) -> NDArray[np.float64]:
    """Return unit(draw(k, i)) for i < count; arrays of u64 wrap by themselves."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    z += np.uint64(key(seed, purpose, hash_name(name)))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def ratio(polynomials: tuple[tuple[float, ...], tuple[float, ...]], r: Any) -> tuple[Any, Any]:
    """Return numerator and denominator at r, by Horner's rule."""
    values = []
    for coefficients in polynomials:
        value = coefficients[-1]
        for coefficient in coefficients[-2::-1]:
            value = value * r + coefficient
        values.append(value)
    return values[0], values[1]


def quantile(q: NDArray[np.float64]) -> NDArray[np.float64]:
    numerator, denominator = ratio(CENTRAL, 0.180625 - q * q)
    value = q * numerator / denominator
    for i in np.flatnonzero(np.abs(q) > 0.425).tolist():
        # At a cut of 2 deviations r is at most 1.95, so the range beyond 5 is never used. The
        # logarithm is the C library's: numpy's own may round otherwise.
        r = math.sqrt(-math.log(0.5 - abs(q[i])))
        above, under = ratio(MIDDLE, r - 1.6)
        value[i] = math.copysign(above / under, q[i])
    return value


def normal(name: str, seed: int, count: int, std: float) -> NDArray[np.float32]:
    q = (units(seed, NORMAL, name, count) - 0.5) * math.erf(2.0 / math.sqrt(2.0))
    return (quantile(q) * std).astype(np.float32)


def uniform(name: str, seed: int, count: int, bound: float) -> NDArray[np.float32]:
    u = units(seed, UNIFORM, name, count)
    return (-bound + u * (bound - -bound)).astype(np.float32)


def shapes(model: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape of each tensor, and what it starts as."""
    h, f, vocabulary = model["hidden_size"], model["ffn_hidden_size"], model["vocab_size"]
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "model.embeddings.tok_embeddings.weight": ((vocabulary, h), "in"),
        "model.embeddings.norm.weight": ((h,), "one"),
    }
    for layer in range(model["num_layers"]):
        prefix = f"model.layers.{layer}."
        if layer:
            found[prefix + "attn_norm.weight"] = ((h,), "one")
        found[prefix + "attn.Wqkv.weight"] = ((3 * h, h), "in")
        found[prefix + "attn.Wo.weight"] = ((h, h), "out")
        found[prefix + "mlp_norm.weight"] = ((h,), "one")
        found[prefix + "mlp.Wi.weight"] = ((2 * f, h), "in")
        found[prefix + "mlp.Wo.weight"] = ((h, f), "out")
    found["model.final_norm.weight"] = ((h,), "one")
    found["head.dense.weight"] = ((h, h), "in")
    found["head.norm.weight"] = ((h,), "one")
    found["decoder.bias"] = ((vocabulary,), "uniform")
    return found


def initial_weights(start: dict[str, Any], only: str | None) -> dict[str, NDArray[np.float32]]:
    model, seed = start["model"], start["seeds"]["init"]
    weights = {}
    for name, (shape, kind) in shapes(model).items():
        if only not in (None, name):
            continue
        count, std = math.prod(shape), model["init_std"]
        if kind == "one":
            values = np.ones(count, dtype=np.float32)
        elif kind == "uniform":
            values = uniform(name, seed, count, 1.0 / math.sqrt(model["hidden_size"]))
        else:
            shrink = math.sqrt(2.0 * model["num_layers"]) if kind == "out" else 1.0
            values = normal(name, seed, count, std / shrink)
        weights[name] = values.reshape(shape)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tensor", help="This one alone.")
    options = parser.parse_args()
    start = next(read_ledger(options.run_dir / "ledger")).payload
    weights = initial_weights(start, options.tensor)
    np.savez(options.output, **weights)
    print(f"{len(weights)} tensors, {sum(w.size for w in weights.values())} values")


if __name__ == "__main__":
    main()
