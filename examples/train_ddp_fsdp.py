"""Trains a small 2:4 sparse model on several processes, and saves a dense-compatible checkpoint.

    torchrun --nproc-per-node 2 examples/train_ddp_fsdp.py                 # DDP
    torchrun --nproc-per-node 2 examples/train_ddp_fsdp.py --fsdp          # FSDP2
    torchrun --nproc-per-node 2 examples/train_ddp_fsdp.py --fsdp --bf16   # gathered as bfloat16

gloo on CPUs, nccl on GPUs. Nothing here but `sparsify`, `attach` and `masks` is nmfx's; the model
is sparsified before it is wrapped, and as it would be in one process.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import nmfx


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(width: int = 64) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(4)), nn.Linear(width, 10))


def distributed(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    if not args.fsdp:
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32
    )
    for block in list(model)[:-1]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, device: str) -> float:
    """Synthetic data: every rank draws its own, and learns the classes of one fixed teacher."""
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(1)).to(device)
    draw = torch.Generator().manual_seed(100 + dist.get_rank())
    for _ in range(steps):
        x = torch.randn(32, 64, generator=draw).to(device)
        loss = nn.functional.cross_entropy(model(x).float(), (x @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dist.all_reduce(loss := loss.detach())
    return float(loss) / dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--bf16", action="store_true", help="with --fsdp: gather bfloat16 weights")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", default="model.pt")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    torch.manual_seed(0)
    model = nmfx.sparsify(build().to(device), "2:4")
    model = distributed(model, args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    nmfx.attach(model, optimizer)  # the decay once per step, however many ranks there are

    before = nmfx.masks(model)
    loss = train(model, optimizer, args.steps, device.type)
    moved = nmfx.sad(before, nmfx.masks(model))  # gathers: all ranks call it

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        torch.save(state, args.save)  # the keys of the dense model
        print(nmfx.report(model))
        print(f"loss {loss:.3f}, {moved.per_weight:.1%} of the mask moved, saved {args.save}")
    dist.barrier()  # no rank leaves while another still works, or while gloo's threads do
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
