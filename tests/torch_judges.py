"""Judging networks in torch, random: transformers' CLIPModel, tiny, and LPIPS restated, as files and as numbers.

In: a seed; prompts and pictures uint8 [h, w, 3]. Out: files as users have them, scores as float64 arrays. Needs torch,
by way of `torch_reference`.
"""

import warnings
from pathlib import Path

import numpy as np
import torch_reference
from torch_reference import randomise, torch, transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import safetensors.torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, POSITIONS = 32, 20


def clip(eos_token_id: int, activation: str, seed: int = 0) -> "transformers.CLIPModel":
    """A CLIPModel of 2 layers a tower, 96 tokens, 16 patches; widths of the towers and of the projection differ."""
    shared = {"num_hidden_layers": 2, "hidden_act": activation}
    text = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
    text |= {"max_position_embeddings": POSITIONS, "eos_token_id": eos_token_id, "bos_token_id": 0, "pad_token_id": 1}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    image |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | shared, vision_config=image | shared, projection_dim=12)
    model = transformers.CLIPModel(config)
    for i, part in enumerate((model.text_model, model.vision_model, model.text_projection, model.visual_projection)):
        randomise(part, seed + i)
    return model.eval()


def save_clip(model, folder: Path):
    """Writes the folder as the hub has it; returns the tokenizer."""
    tokenizer, _ = torch_reference.tokenizers(torch_reference.tiny())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prepare(pictures) -> "torch.Tensor":
    """transformers' own preprocessing [b, 3, h, w]."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return processor(list(pictures), return_tensors="pt")["pixel_values"]


def clip_scores(model, tokenizer, prompts, pictures) -> np.ndarray:
    """100 times the cosine of prompt i and picture i."""
    ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=ids["input_ids"], pixel_values=prepare(pictures))
    return 100 * (out.text_embeds * out.image_embeds).sum(-1).double().numpy()


class Trunk(torch.nn.Module):
    """AlexNet's features, cut behind each ReLU, under the names of the package `lpips`."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.slice1 = nn.Sequential()
        self.slice1.add_module("0", nn.Conv2d(3, 64, 11, stride=4, padding=2))
        self.slice1.add_module("1", nn.ReLU())
        sizes = {2: (3, 64, 192, 5), 3: (6, 192, 384, 3), 4: (8, 384, 256, 3), 5: (10, 256, 256, 3)}
        for number, (place, d_in, d_out, kernel) in sizes.items():
            part = nn.Sequential()
            if number in (2, 3):
                part.add_module(str(place - 1), nn.MaxPool2d(3, 2))
            part.add_module(str(place), nn.Conv2d(d_in, d_out, kernel, padding=kernel // 2))
            part.add_module(str(place + 1), nn.ReLU())
            setattr(self, f"slice{number}", part)


class LPIPS(torch.nn.Module):
    """Zhang et al. (2018), equation 1, for the "alex" network, version 0.1; random, its last weights not negative."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.net = randomise(Trunk(), seed)
        last = [torch.nn.Conv2d(width, 1, 1, bias=False) for width in (64, 192, 384, 256, 256)]
        for number, conv in enumerate(last):
            torch.nn.init.uniform_(conv.weight, generator=torch.Generator().manual_seed(seed + number))
            branch = torch.nn.Module()
            branch.model = torch.nn.Sequential(torch.nn.Dropout(), conv)
            setattr(self, f"lin{number}", branch)
        self.lins = torch.nn.ModuleList([getattr(self, f"lin{number}") for number in range(5)])
        self.eval()

    def forward(self, a, b):
        shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
        a, b = (a - shift) / scale, (b - shift) / scale
        total = 0
        for number in range(5):
            part = getattr(self.net, f"slice{number + 1}")
            a, b = part(a), part(b)
            unit_a, unit_b = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            total = total + self.lins[number].model((unit_a - unit_b) ** 2).mean((1, 2, 3))
        return total


def save_lpips(model, file: Path) -> None:
    safetensors.torch.save_model(model, str(file))


def lpips_distance(model, a, b) -> float:
    """Of two pictures uint8 [h, w, 3]."""
    a, b = (torch_reference.tensor(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (a, b))
    with torch.no_grad():
        return float(model(a, b))
