import random

import pytest
import torch

from cosup.engine.reader import Chunk, Gen, Reader
from cosup.model import CoSupModel


def whole(model: CoSupModel, ids: list[int]) -> torch.Tensor:
    """States [T, D] of one sequence, read at once and without a cache."""
    out = model.gen.base_model(input_ids=torch.tensor([ids]), seq_lens=torch.tensor([len(ids)]), use_cache=False)
    return out.last_hidden_state[0]  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_rows_read_in_pieces_of_any_size_and_order_give_the_states_of_one_pass(tiny: CoSupModel, seed: int) -> None:
    rng = random.Random(seed)
    rows = rng.randint(1, 7)
    sequences = [[rng.randrange(300) for _ in range(rng.randint(1, 150))] for _ in range(rows)]
    reader, read = Reader(Gen.of(tiny), rows), [0] * rows
    wholes = [whole(tiny, ids) for ids in sequences]
    while any(done < len(ids) for done, ids in zip(read, sequences, strict=True)):
        ready = [row for row in range(rows) if read[row] < len(sequences[row])]
        chunks = []
        for row in rng.sample(ready, rng.randint(1, len(ready))):
            ids = sequences[row][read[row] : read[row] + rng.choice([1, 1, 1, 2, 9, 60])]
            chunks.append(Chunk(row, read[row], ids, rng.randint(1, len(ids))))
        states = reader.read(chunks).split([chunk.wanted for chunk in chunks])
        for chunk, states_WD in zip(chunks, states, strict=True):
            read[chunk.slot] += len(chunk.ids)
            end = read[chunk.slot]
            torch.testing.assert_close(states_WD, wholes[chunk.slot][end - chunk.wanted : end], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_was_read_can_be_overwritten_from_any_place(tiny: CoSupModel) -> None:
    reader = Reader(Gen.of(tiny), 2)
    reader.read([Chunk(0, 0, [5, 6, 7, 8, 9]), Chunk(1, 0, [1])])
    (state,) = reader.read([Chunk(0, 2, [20, 21])])
    torch.testing.assert_close(state, whole(tiny, [5, 6, 20, 21])[-1])


@torch.no_grad()
def test_a_row_goes_on_from_a_copy_of_another_ones_beginning(tiny: CoSupModel) -> None:
    reader = Reader(Gen.of(tiny), 8)
    reader.read([Chunk(0, 0, [5, 6, 7, 8])])
    reader.copy(0, 6, 3)
    states = reader.read([Chunk(6, 3, [30]), Chunk(0, 4, [9])])
    torch.testing.assert_close(states[0], whole(tiny, [5, 6, 7, 30])[-1])
    torch.testing.assert_close(states[1], whole(tiny, [5, 6, 7, 8, 9])[-1])
