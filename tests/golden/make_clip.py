"""Makes clip.safetensors and clip.npz with the transformers library (see README.md).

python tests/golden/make_clip.py
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

HERE = Path(__file__).parent
TEXT = dict(
    hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
    vocab_size=40, max_position_embeddings=12, bos_token_id=38, eos_token_id=39, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    image_size=16, patch_size=4,
)  # fmt: skip


def main():
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20))
    # The library's own initial weights leave the attention nearly uniform.
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model = model.eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 38, (3, 12))
    ids[:, 0] = 38
    for row, end in enumerate((4, 11, 1)):
        ids[row, end], ids[row, end + 1 :] = 39, 0
    pictures = {
        f"picture_{h}x{w}": rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        for h, w in ((16, 16), (37, 53), (40, 19), (9, 12))
    }
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    pixels = processor(list(pictures.values()), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(torch.tensor(ids), pixels)
    numbers = {
        "text_states": output.text_model_output.last_hidden_state,
        "text_embedding": output.text_embeds,
        "pixels": pixels,
        "image_embedding": output.image_embeds,
        "logits_per_text": output.logits_per_text,
    }
    numbers = {name: value.numpy() for name, value in numbers.items()}
    np.savez_compressed(HERE / "clip.npz", ids=ids.astype(np.int32), **pictures, **numbers)
    save_file(model.state_dict(), HERE / "clip.safetensors")


if __name__ == "__main__":
    main()
