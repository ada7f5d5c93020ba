# SPDX-License-Identifier: MIT
"""The examples of docs/distributed.md run on two ranks, and give what one process gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What is true after the examples. The ranks have drawn the same numbers.
CHECKS = """
import os

def gathered(X, dim=1):
    parts = [None] * size
    dist.all_gather_object(parts, X.detach())
    return torch.cat(parts, dim)

whole = gathered(x).requires_grad_()
ranges = torch.stack([torch.zeros(N).long(), torch.arange(N) + 1], dim=1)
one = functional.convnn(
    whole, whole, whole, 5, weight, self_indices=torch.arange(N), key_range=ranges,
    metric="euclidean",
)
assert torch.equal(gathered(y), one)
sum_over_ranks = weight.grad.clone()
weight.grad = None
one.square().sum().backward()
torch.testing.assert_close(sum_over_ranks, weight.grad)
torch.testing.assert_close(gathered(x.grad), whole.grad)

expected = functional.select_neighbors(query, key, 5)
assert torch.equal(indices.full_tensor(), expected[1])
assert torch.equal(similarities.full_tensor(), expected[0])

torch.manual_seed(5)
copy = cnn.ConvNNAttention(32, num_heads=4, k=5)
copy.load_state_dict({
    name: getattr(X, "full_tensor", lambda X=X: X)() for name, X in attention.state_dict().items()
})
output = copy(tokens)
output.square().mean().backward()
torch.testing.assert_close(attention(tokens), output)
torch.testing.assert_close(attention.weight.grad, copy.weight.grad)
print("all ran", flush=True)
dist.destroy_process_group()
# Groups that a mesh holds live on: a thread of gloo that still has the tensors of the last message
# when the interpreter ends makes PyTorch abort, also without our layers.
os._exit(0)
"""


@pytest.mark.slow
def test_examples_run(tmp_path: Path) -> None:
    text = (ROOT / "docs/distributed.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 6
    program = tmp_path / "example.py"
    program.write_text("\n".join([*snippets, CHECKS]))
    run = "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)
    done = subprocess.run(
        [sys.executable, "-m", *run],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all ran") == 2
