"""An imported model has the logits of transformers under every layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import open_checkpoint
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from tests.distributed.launch import run_distributed
from tests.hf_folders import VOCAB, folder_of, model_of, tokens_of
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
SHAPE = "Super, latent experts, MTP"
LAYOUTS = {
    "TP2": Parallel(tensor=2),
    "PP2": Parallel(pipeline=2),
    "EP2": Parallel(expert=2),
    "TP2, whole experts": Parallel(tensor=2, expert=2, expert_tensor=1),
}
LENGTHS = (1, 127, 128, 129, 300)  # around the chunk of the scan, and beyond
SHARE = 1e-4  # of the standard deviation of the logits


@pytest.mark.slow
def test_an_imported_model_has_the_logits_of_transformers_under_every_layout(
    tmp_path: Path,
) -> None:
    import_folder(folder_of(SHAPE, tmp_path / "hf"), tmp_path / "run", None)
    theirs = model_of(SHAPE)
    found = run_distributed(_logits_of_all_layouts, 2, tmp_path / "run")
    for layout in LAYOUTS:
        for number, length in enumerate(LENGTHS):
            with torch.no_grad():
                expected = theirs(tokens_of(length), use_cache=False).logits
            # The last stage has the logits; where there are no stages every process has them.
            actual = found[1][layout][number]
            assert (actual - expected).abs().max() <= SHARE * expected.std(), (layout, length)


def _logits_of_all_layouts(run_dir: Path) -> dict[str, list[Tensor]]:
    """Load the checkpoint under each layout in turn."""
    cpu.install()
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.model.build import build_model

    found = {}
    for name, parallel in LAYOUTS.items():
        groups = build_groups(parallel, timeout_s=60)
        job = open_checkpoint(run_dir).job
        job.parallel = parallel
        job.runtime = Runtime(device=Device.cpu, kernels=Kernels.plain, threads=1)
        (model,) = build_model(job, groups, VOCAB, on_gpu=False).chunks
        read_weights(open_checkpoint(run_dir).found.path, [model], groups)
        found[name] = [_logits(model.eval(), groups, tokens_of(length)) for length in LENGTHS]
        destroy_groups()
    return found


@torch.no_grad()
def _logits(model: torch.nn.Module, groups: object, tokens: Tensor) -> Tensor:
    """Run all stages; a token behind an odd length, which no other sees, lets TP split it."""
    sequences, length = tokens.shape
    padded = torch.nn.functional.pad(tokens, (0, length % 2))
    if groups.pp.size() == 1:
        return model(padded).logits()[:, :length, :VOCAB].clone()
    hidden = torch.empty(padded.shape[1], sequences, model.config.hidden_size)
    if groups.pp.rank() == 0:
        dist.send(model(padded).contiguous(), dst=1)
        return hidden
    dist.recv(hidden, src=0)
    model.set_input_tensor(hidden)
    return model(padded).logits()[:, :length, :VOCAB].clone()
