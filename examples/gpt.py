r"""A small GPT on any text, on one device, many, or many machines: layer rotation is the same on all of them.

    uv run --no-dev --extra examples examples/gpt.py --accelerator cpu

Two processes that share the weights (FSDP2), here on two CPU cores; and two machines with eight GPUs each, where the
command runs on both, with --node-rank 1 on the second:

    uv run --no-dev --extra examples torchrun --nproc-per-node 2 \
        examples/gpt.py --accelerator cpu --strategy fsdp2 --devices 2
    uv run --no-dev --extra examples torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 \
        --master-addr FIRST_MACHINE --master-port 29500 examples/gpt.py --strategy fsdp2 --devices 8 --num-nodes 2

Reads bytes of --data, or without it of Python's own standard library, and predicts the next one. The batch that all
processes see together depends on neither their number nor the strategy, so that the curves must be the same but for
round-off: in fp32, two processes under FSDP2 and one differed by 2e-10 in rotation after 12 steps of a smaller network.

You should see after 400 steps, about 40 s of one CPU core: a validation loss of 2.26 nats a byte (Python 3.11's
library; other versions have other sources), `head` at a rotation of 0.096 and all layers of the blocks between 0.016
and 0.039, queries and keys of the first block furthest. With --optimizer adamw, 2.30, and rotations are less even: 0.21
for queries and 0.03 for values. Each is the better of two rates (adamw 1e-3: 2.32; layca 3^-4: 2.39), with one seed:
too little to say which optimizer is better.
"""

import argparse
import logging
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers


class Block(nn.Module):
    """Attention and MLP, with normalization before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(pl.LightningModule):
    """Next byte from the bytes before it."""

    def __init__(self, optimizer: str, lr: float, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def configure_model(self) -> None:
        # Only ModelParallelStrategy has a mesh: under all others the module stays as it is.
        if self.device_mesh is not None:
            for module in (*self.blocks, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, window: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def training_step(self, window: Tensor) -> Tensor:
        return self.loss(window)

    def validation_step(self, window: Tensor) -> None:
        self.log("val_loss", self.loss(window), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        if self.optimizer == "layca":
            return layca_optimizers(self, lr=self.lr, base="AdamW", schedule="cosine", warmup_steps=steps // 10)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# The better of two rates a factor of three apart.
RATES = {"adamw": 3e-3, "layca": 3**-5}


class Windows(Dataset[Tensor]):
    """Pieces of the text at places that only the seed decides."""

    def __init__(self, text: Tensor, count: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.text, self.length = text, length
        self.starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return self.text[start : start + self.length].long()


class Text(pl.LightningDataModule):
    """Training and validation windows.

    Each process takes every n-th window of a batch: Lightning's own sampler would shuffle them, in another order for
    every number of processes.
    """

    def __init__(self, text: Tensor, length: int, batch_size: int, steps: int) -> None:
        super().__init__()
        border = int(0.9 * len(text))
        self.batch_size = batch_size
        self.train = Windows(text[:border], steps * batch_size, length, seed=1)
        self.validation = Windows(text[border:], 8 * batch_size, length, seed=2)

    def loader(self, windows: Windows) -> DataLoader[Tensor]:
        processes = self.trainer.world_size
        sampler = DistributedSampler(windows, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(windows, self.batch_size // processes, sampler=sampler)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self.loader(self.train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self.loader(self.validation)


def read_text(path: Path | None) -> Tensor:
    """The bytes of a file, or of the modules of Python's standard library in alphabetical order."""
    files = [path] if path else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small GPT on any text, on one device or many.")
    parser.add_argument("--data", type=Path, help="a text file; default: the sources of Python's standard library")
    parser.add_argument("--strategy", choices=("auto", "ddp", "fsdp2"), default="auto")
    parser.add_argument("--devices", type=int, default=1, help="processes on each machine")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--optimizer", choices=RATES, default="layca")
    parser.add_argument("--lr", type=float, help="default: 0.003 for adamw, 3^-5 for layca")
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step, over all processes")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("gpt"), help="folder for the page and the curves")
    arguments = parser.parse_args()
    processes = arguments.devices * arguments.num_nodes
    if arguments.batch_size % processes:
        parser.error(f"--batch-size {arguments.batch_size} must be a multiple of the {processes} processes")
    text, length = read_text(arguments.data), arguments.context + 1
    if len(text) <= 10 * length:
        parser.error(f"--data must hold more than {10 * length} bytes, got {len(text)}")
    # The run's progress is what matters here, not what the libraries say about themselves.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    pl.seed_everything(arguments.seed, verbose=False)
    strategy: Any = arguments.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator=arguments.accelerator,
        strategy=strategy,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        precision=arguments.precision,
        callbacks=[LayerRotationMonitor()],
        default_root_dir=arguments.output,
        logger=False,
        log_every_n_steps=max(1, min(10, arguments.max_steps // 10)),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    sizes = {name: getattr(arguments, name) for name in ("context", "width", "depth", "heads")}
    gpt = GPT(arguments.optimizer, arguments.lr or RATES[arguments.optimizer], **sizes)
    trainer.fit(gpt, Text(text, length, arguments.batch_size, arguments.max_steps))
    if trainer.is_global_zero:
        print(f"Validation loss: {trainer.callback_metrics['val_loss']:.3f} nats a byte")


if __name__ == "__main__":
    main()
