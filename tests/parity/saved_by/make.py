"""Make the folders beside this file: `python make.py OUTPUT`, with one transformers installed.

Each holds a tiny model as that version saved it, and the logits that it computed itself.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "local_attention": 16,
    "global_rope_theta": 160_000.0,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
KINDS = {
    "encoder": ("ModernBertConfig", "ModernBertForMaskedLM"),
    "decoder": ("ModernBertDecoderConfig", "ModernBertDecoderForCausalLM"),
}
#: Version 4 rotates all layers of a decoder by the global base, whatever its config.json says.
LOCAL_BASES = {"encoder": 10_000.0, "decoder": 160_000.0}
#: Five windows of local layers, and a text shorter than one.
LENGTHS = (40, 5)


def main() -> None:
    """Save every kind of model that the installed version has."""
    for kind, (config_name, model_name) in KINDS.items():
        if not hasattr(transformers, config_name):
            continue
        torch.manual_seed(7)
        shape = {**SHAPE, "local_rope_theta": LOCAL_BASES[kind]}
        config = getattr(transformers, config_name)(**shape)
        # Version 4.54 has no other one for decoders.
        config._attn_implementation = "eager"
        model = getattr(transformers, model_name)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 0.06
                parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.dim() == 1))
        folder = Path(sys.argv[1]) / f"{transformers.__version__}-{kind}"
        model.save_pretrained(folder)
        said = {}
        for length in LENGTHS:
            tokens = torch.randint(4, SHAPE["vocab_size"], (1, length))
            with torch.inference_mode():
                logits = model(input_ids=tokens).logits
            said |= {f"tokens_{length}": tokens[0], f"logits_{length}": logits[0].contiguous()}
        save_file(said, folder / "said.safetensors")


if __name__ == "__main__":
    main()
