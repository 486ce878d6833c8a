"""How fast data comes in: from JPEG files, from cached codes, and through the f8 autoencoder.

    pip install -e '.[benchmark]' torchvision
    python benchmarks/data.py [--pixels] [--codes] [--encoder]    (none: all three)

``--pixels``: records a second from 256-pixel JPEG files to uint8 batches through the published
training crop, beside a PyTorch ``DataLoader`` with torchvision's functions (Pillow's alone where
torchvision does not load). ``--codes``: an epoch of a synthetic cache of a million records of 1024
codes and one caption, written to a temporary folder (2.4 GB), with the resident memory at its
start, middle and end. ``--encoder``: images to codes with the network of the published f8
autoencoder (random weights), beside the same network in PyTorch, in its channels-first default and
channels last; the codes are compared.

What is compared takes turns in one process, and the ratio is the median over rounds.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
from array_record.python import array_record_module
from PIL import Image

from vqd_jax import files
from vqd_jax.data import batches, codes
from vqd_jax.data.encode import Codec
from vqd_jax.models import autoencoder

try:
    import torchvision.transforms.functional as tv
except (ImportError, RuntimeError):  # Its operators may belong to another build of PyTorch.
    tv = None

SIZE, BATCH, WORKERS = 256, 64, 2
PHOTOS, ROUNDS = 1024, 5
RECORDS, TOKENS, LENGTH, PER_SHARD = 1_000_000, 1024, 77, 4096
F8 = autoencoder.AutoencoderConfig(
    image_size=256,
    channels=128,
    channel_multipliers=(1, 1, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(32,),
    latent_channels=256,
    codebook_dim=256,
    num_codes=8192,
    quantizer="gumbel",
)


def photo(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of so many pixels on its short side, about as hard to decode as a photograph."""
    height, width = side, round(side * rng.uniform(1, 1.6))
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + rng.normal(0, 6, (height, width, 1)) + rng.normal(0, 3, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


class Files:
    """Random-access records of a folder of images."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._paths[index].read_bytes()}


class TorchFiles(torch.utils.data.Dataset):
    """The same in PyTorch, with the published training crop."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with open(self._paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        side = min(image.size)
        top, left = (self._between(3 * (n - side) // 8, 5 * (n - side) // 8) for n in
                     (image.height, image.width))  # fmt: skip
        scaled = self._between(SIZE, max(SIZE, min(side, round(SIZE * 9 / 8))) + 1)
        inner_top, inner_left = (self._between(0, scaled - SIZE + 1) for _ in range(2))
        if tv is None:
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((scaled, scaled), Image.Resampling.BICUBIC)
            box = (inner_left, inner_top, inner_left + SIZE, inner_top + SIZE)
            return torch.from_numpy(np.array(image.crop(box)))
        image = tv.crop(image, top, left, side, side)
        image = tv.resize(image, [scaled, scaled], tv.InterpolationMode.BICUBIC)
        return tv.pil_to_tensor(tv.crop(image, inner_top, inner_left, SIZE, SIZE))

    @staticmethod
    def _between(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low + 1), ()))


def rate(batches, warm_up: int, count: int) -> float:
    """Records a second of ``count`` batches after ``warm_up`` that fill what runs ahead."""
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    start = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return count * BATCH / (time.perf_counter() - start)


def pixels(folder: Path) -> None:
    """Prints records a second from files, ours and PyTorch's."""
    rng = np.random.default_rng(0)
    for side in (SIZE, 480):
        paths = [folder / f"{side}_{i:05d}.jpg" for i in range(PHOTOS)]
        for path in paths:
            path.write_bytes(photo(rng, side))
        crop = batches.Crop(SIZE, random=True)
        ours = batches.image_dataset(Files(paths), crop, BATCH, 0, num_threads=WORKERS)
        theirs = torch.utils.data.DataLoader(
            TorchFiles(paths * 100), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True
        )
        ratios = []
        for _ in range(ROUNDS):
            mine, other = rate(ours, 8, 60), rate(theirs, 8, 60)
            ratios.append(mine / other)
            print(
                f"  {side} pixels: ours {mine:6.0f}, PyTorch {other:6.0f} records/s: "
                f"{mine / other:.2f}"
            )
        name = "torchvision" if tv else "Pillow"
        print(f"pixels, short side {side}: {statistics.median(ratios):.2f} times {name}'s")


def resident() -> float:
    """MB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_cache(folder: Path) -> codes.CodesSource:
    """A cache of random codes, as ``encode.encode_split`` would leave it."""
    rng = np.random.default_rng(0)
    num_shards = -(-RECORDS // PER_SHARD)
    shards = []
    for shard in range(num_shards):
        path = folder / f"codes-{shard:05d}-of-{num_shards:05d}.array_record"
        ids = range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, RECORDS))
        rows = rng.integers(0, 8192, (len(ids), 1, TOKENS), dtype=np.uint16)
        text = rng.integers(0, 49408, (len(ids), 1, LENGTH), dtype=np.uint16)
        nothing = np.zeros((1, LENGTH, 0), np.float16)
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for i, number in enumerate(ids):
            record = codes.CachedRecord(number, 0, rows[i], text[i], nothing)
            writer.write(record.to_bytes())
        writer.close()
        shards.append({"file": path.name, "records": len(ids), "bytes": path.stat().st_size})
    layout = {
        "num_tokens": TOKENS,
        "num_crops": 1,
        "context_length": LENGTH,
        "feature_width": 0,
        "num_classes": 0,
        "null_text_ids": [49406, 49407] + [0] * (LENGTH - 2),
    }
    manifest = {"format": codes.FORMAT, "origin": {}, "layout": layout, "shards": shards}
    files.write_json(folder / codes.MANIFEST, manifest)
    return codes.open_split(str(folder))


def cached(folder: Path) -> None:
    """Prints records a second and resident memory over an epoch of cached codes."""
    start = time.perf_counter()
    cache = write_cache(folder)
    print(f"  wrote {RECORDS:,} records in {time.perf_counter() - start:.0f} s")
    for batch_size in (32, 256):
        dataset = batches.code_dataset(cache, batch_size, 0, 0.1, with_ids=True)
        iterator = iter(dataset)
        num_batches = RECORDS // batch_size
        next(iterator)
        memory, seen = [resident()], np.zeros(RECORDS, np.int8)
        start, cpu_start = time.perf_counter(), time.process_time()
        for index in range(1, num_batches):
            seen[next(iterator)["id"]] += 1
            if index in (num_batches // 2, num_batches - 1):
                memory.append(resident())
        count = (num_batches - 1) * batch_size
        speed = count / (time.perf_counter() - start)
        cpu_speed = count / (time.process_time() - cpu_start)
        print(
            f"codes, batches of {batch_size}: {speed:,.0f} records/s ({cpu_speed:,.0f} a second of "
            f"processor time); resident at start, middle, end: "
            f"{', '.join(f'{m:.0f}' for m in memory)} MB; no record more than {seen.max()} time(s)"
        )


class TorchResBlock(torch.nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = torch.nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = torch.nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = torch.nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.nin_shortcut = torch.nn.Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(self, x):
        silu = torch.nn.functional.silu
        y = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class TorchAttention(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = torch.nn.GroupNorm(32, channels, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, torch.nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        y = self.norm(x)
        b, c, h, w = y.shape
        q, k, v = (f(y).reshape(b, c, h * w) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, dim=2)
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w))


class TorchLevel(torch.nn.Module):
    def __init__(self, in_channels, out_channels, attends, downsamples):
        super().__init__()
        widths = [in_channels] + [out_channels] * F8.num_res_blocks
        self.block = torch.nn.ModuleList(
            itertools.starmap(TorchResBlock, itertools.pairwise(widths))
        )
        self.attn = torch.nn.ModuleList(
            TorchAttention(out_channels) for _ in range(F8.num_res_blocks * attends)
        )
        if downsamples:
            self.downsample = torch.nn.Module()
            self.downsample.conv = torch.nn.Conv2d(out_channels, out_channels, 3, stride=2)

    def forward(self, x):
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        if hasattr(self, "downsample"):
            x = self.downsample.conv(torch.nn.functional.pad(x, (0, 1, 0, 1)))
        return x


class TorchEncoder(torch.nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> codes [B, N], with the names of our parameters."""

    def __init__(self):
        super().__init__()
        widths = [F8.channels * m for m in F8.channel_multipliers]
        self.encoder = torch.nn.Module()
        self.encoder.conv_in = torch.nn.Conv2d(3, F8.channels, 3, padding=1)
        self.encoder.down = torch.nn.ModuleList(
            TorchLevel(
                before,
                width,
                F8.image_size >> i in F8.attention_resolutions,
                i < len(widths) - 1,
            )
            for i, (before, width) in enumerate(itertools.pairwise([F8.channels, *widths]))
        )
        self.encoder.mid = torch.nn.Module()
        self.encoder.mid.block_1 = TorchResBlock(widths[-1], widths[-1])
        self.encoder.mid.attn_1 = TorchAttention(widths[-1])
        self.encoder.mid.block_2 = TorchResBlock(widths[-1], widths[-1])
        self.encoder.norm_out = torch.nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.encoder.conv_out = torch.nn.Conv2d(widths[-1], F8.latent_channels, 3, padding=1)
        self.quant_conv = torch.nn.Conv2d(F8.latent_channels, F8.codebook_dim, 1)
        self.quantize = torch.nn.Module()
        self.quantize.proj = torch.nn.Conv2d(F8.codebook_dim, F8.num_codes, 1)

    def forward(self, images):
        encoder = self.encoder
        x = encoder.conv_in(images)
        for level in encoder.down:
            x = level(x)
        x = encoder.mid.block_2(encoder.mid.attn_1(encoder.mid.block_1(x)))
        x = encoder.conv_out(torch.nn.functional.silu(encoder.norm_out(x)))
        return self.quantize.proj(self.quant_conv(x)).argmax(dim=1).flatten(1)

    def load(self, params: dict) -> None:
        """Takes over our parameters."""
        own = {}
        for name in self.state_dict():
            *path, leaf = name.split(".")
            node = params
            for key in path:
                node = node[int(key) if key.isdigit() and int(key) in node else key]
            if leaf == "bias":
                value = node["bias"]
            elif "scale" in node:
                value = node["scale"]
            else:
                value = np.transpose(node["kernel"], (3, 2, 0, 1))
            own[name] = torch.tensor(np.asarray(value))
        self.load_state_dict(own)


def encoder(batch_size: int = 2) -> None:
    """Prints images a second of the f8 encoder, ours and PyTorch's."""
    params = jax.jit(lambda key: autoencoder.init_params(F8, key))(jax.random.key(0))
    ours = Codec(F8, params)
    theirs = TorchEncoder().eval()
    theirs.load(jax.tree.map(np.asarray, params))
    images = np.random.default_rng(0).integers(0, 256, (batch_size, SIZE, SIZE, 3), dtype=np.uint8)

    def run_ours():
        return np.asarray(ours.encode(images))

    @torch.inference_mode()
    def run_theirs(layout=torch.contiguous_format):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return theirs(x.contiguous(memory_format=layout)).numpy()

    same = (run_ours() == run_theirs()).mean()
    print(f"  {same:.2%} of the codes are the same")
    for name, layout in (("channels first", torch.contiguous_format),
                         ("channels last", torch.channels_last)):  # fmt: skip
        theirs.to(memory_format=layout)
        run_theirs(layout)
        ratios = []
        for _ in range(ROUNDS):
            times = []
            for run in (run_ours, lambda layout=layout: run_theirs(layout)):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            ratios.append(times[1] / times[0])
            print(f"  {name}: ours {batch_size / times[0]:.3f}, PyTorch "
                  f"{batch_size / times[1]:.3f} images/s: {ratios[-1]:.2f}")  # fmt: skip
        print(f"f8 encoder: {statistics.median(ratios):.2f} times PyTorch, {name}")


def main() -> None:
    """Runs what the flags name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("pixels", "codes", "encoder"):
        parser.add_argument(f"--{name}", action="store_true")
    chosen = parser.parse_args()
    everything = not (chosen.pixels or chosen.codes or chosen.encoder)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        if everything or chosen.pixels:
            pixels(Path(folder))
        if everything or chosen.codes:
            cached(Path(folder))
    if everything or chosen.encoder:
        encoder()


if __name__ == "__main__":
    main()
