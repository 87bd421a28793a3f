"""The mean of what several runs have taught Gen, as one model with adapters of the same rank.

    python experiments/average.py RUN RUN ... --out FOLDER [--emb]

The runs started from the same weights. Emb_seq stays that of the first, and with it every index that it made; with
`--emb` it becomes the mean of theirs, with the projection where there is one, and indexes have to be built again.

Source: Wortsman et al. 2022, Model soups (arXiv 2203.05482).
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosup.config import UserError
from cosup.files import atomic_folder
from cosup.model.folders import find_model, read_settings, renew_fingerprint

GEN, EMB, PROJECTION = "gen/adapter_model.safetensors", "emb/adapter_model.safetensors", "projection.safetensors"
DOWN, UP = "lora_A", "lora_B"


def main() -> None:
    """Writes the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run or model folders with adapters")
    parser.add_argument("--out", type=Path, required=True, help="the model folder that is written")
    parser.add_argument("--emb", action="store_true", help="takes the mean of Emb_seq too")
    arguments = parser.parse_args()
    models = [find_model(run) for run in arguments.runs]
    projected = (models[0] / PROJECTION).is_file()
    files = [GEN, *([EMB] if arguments.emb else []), *([PROJECTION] if arguments.emb and projected else [])]
    if missing := next((model / file for model in models for file in files if not (model / file).is_file()), None):
        raise UserError(f"there is no {missing} to take the mean of: train with model.lora, all runs by one recipe")
    if read_settings(models[0]).emb_is_gen:
        raise UserError(f"in {models[0]} Emb_seq is Gen, and its indexes would be lost: average runs with an Emb_seq")
    if arguments.out.resolve() in [model.resolve() for model in models]:
        raise UserError(f"{arguments.out} is read, and would be replaced; name another folder with --out")
    averaged = {file: mean([read(model / file) for model in models]) for file in files}
    with atomic_folder(arguments.out, marker="cosup.json") as new:
        shutil.copytree(models[0], new, dirs_exist_ok=True)
        for file, weights in averaged.items():
            save_file(weights, new / file, metadata={"format": "pt"})
        renew_fingerprint(new)


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a file. Raises UserError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path} is damaged ({e}); copy it again, or train again") from None


def mean(adapters: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of adapters: of every product of two factors the best approximation of their rank, of all else itself.

    Raises:
        UserError: they are not of the same layers and rank.
    """
    shapes = [{name: weight.shape for name, weight in each.items()} for each in adapters]
    if any(each != shapes[0] for each in shapes):
        raise UserError("the runs' adapters are not of the same layers and rank: take runs of one recipe")
    averaged = {}
    for name, first in adapters[0].items():
        if DOWN in name:
            up = name.replace(DOWN, UP)
            factors = low_rank([each[up] for each in adapters], [each[name] for each in adapters])
            averaged[up], averaged[name] = (factor.to(first.dtype).contiguous() for factor in factors)
        elif UP not in name:
            averaged[name] = torch.stack([each[name].float() for each in adapters]).mean(0).to(first.dtype)
    return averaged


def low_rank(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of products [M, R] @ [R, N] as one such product, in float32, nearest in the Frobenius norm."""
    rank = ups[0].shape[1]
    up_MR, down_RN = torch.cat([up.float() for up in ups], 1) / len(ups), torch.cat([down.float() for down in downs])
    left_MR, left_RR = torch.linalg.qr(up_MR)
    right_NR, right_RR = torch.linalg.qr(down_RN.T)
    u, s, v = torch.linalg.svd(left_RR @ right_RR.T)
    root = s[:rank].sqrt()
    return left_MR @ u[:, :rank] * root, root[:, None] * (right_NR @ v[:rank].T).T


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
