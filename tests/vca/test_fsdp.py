"""FSDP2 as docs/training.md shows it: two processes over Gloo learn what one does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
PROGRAM = """
import sys, torch, vca
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh

torch.manual_seed(0)
model = vca.create_model("vca_vit_pico_patch4_32", num_classes=5, embed_dim=24, num_heads=3, depth=2)
rank, size = 0, 1
if sys.argv[2] == "two":
    mesh = init_device_mesh("cpu", (2,))
    rank, size = dist.get_rank(), dist.get_world_size()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(5, (4,), generator=generator)
    rows = slice(rank * 4 // size, (rank + 1) * 4 // size)
    loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    torch.save(state, sys.argv[1])
if size > 1:
    dist.destroy_process_group()
"""


@pytest.mark.long
def test_two_sharded_processes_learn_what_one_does(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = dict(PYTHONPATH=str(ROOT), PATH="/usr/bin:/bin", OMP_NUM_THREADS="1")
    for name, start in (("one", [sys.executable]), ("two", TORCHRUN)):
        command = [*start, program, tmp_path / f"{name}.pt", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4, msg=key)
