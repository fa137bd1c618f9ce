"""Stored keys and values equal the text in the context; files can be composed, moved and deleted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny_models import tiny_base
from titans_ds.errors import DataError, UnsupportedModelError
from titans_ds.text_memory import KeyValueStore
from titans_ds.text_memory.key_values import compose, layers_of, select

KINDS = ["llama", "qwen3_5"]  # attention alone, and with linear-attention layers


def text(count: int, seed: int) -> Tensor:
    return torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed))


def in_context(base: nn.Module, files: list[Tensor], last: Tensor) -> Tensor:
    """Losses of the last text but its first token, with the files in front of it in one pass."""
    whole = torch.cat([*files, last])
    with torch.no_grad():
        given = torch.log_softmax(base(whole[None]).logits[0].float(), dim=-1)
    return -given[len(whole) - len(last) : -1].gather(1, last[1:, None]).squeeze(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_store_equals_the_text_in_the_context(kind: str) -> None:
    base, files, asked = tiny_base(kind).eval(), [text(30, 0), text(1, 1), text(17, 2)], text(40, 3)
    store = KeyValueStore(base)
    found = store.losses(store.write(files), asked)
    torch.testing.assert_close(found, in_context(base, files, asked), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(store.losses({}, asked), in_context(base, [], asked), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_be_read_in_pieces_and_the_state_stays(kind: str) -> None:
    store = KeyValueStore(tiny_base(kind).eval())
    state, asked = store.write([text(20, 0)]), text(24, 1)
    with torch.no_grad():
        whole = store.reader(state).advance(asked)
        reader = store.reader(state)
        pieces = torch.cat([reader.advance(piece) for piece in asked.split([1, 9, 14])])
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    reader = store.reader(state)
    longest = store.generate(state, asked, 4)
    assert longest.tolist() == store.generate(state, asked, 4).tolist()
    with torch.no_grad():
        assert reader.advance(asked)[-1].argmax() == longest[0]


def test_keys_turn_back_and_forth() -> None:
    store = KeyValueStore(tiny_base("llama").eval())
    keys = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100, 109)
    torch.testing.assert_close(store.rotary(store.rotary(keys, positions), positions, back=True), keys)
    moved = store.rotary(keys, torch.stack([positions, positions + 1]))
    torch.testing.assert_close(moved[0], store.rotary(keys, positions)[0])
    assert not torch.allclose(moved[1], store.rotary(keys, positions)[1])


def test_a_deleted_file_has_never_been_there() -> None:
    """Files that end where the text begins don't know of one another."""
    base = tiny_base("llama").eval()
    store = KeyValueStore(base, "independent", "parallel")
    both, alone = store.write([text(12, 0), text(20, 1)]), store.write([text(20, 1)])
    index = torch.arange(12, 32).expand(2, -1)
    left = select(both, dict.fromkeys(layers_of(both), index))
    for name, tensor in alone.items():
        torch.testing.assert_close(left[name], tensor.expand_as(left[name]), msg=name)
    first = store.write([text(20, 1)])
    assert (
        store.num_bytes(compose(first, first)) - 2 * store.num_bytes(first) == -4
    )  # one number, where the text begins


def test_one_independent_file_is_the_sequential_one() -> None:
    base, asked = tiny_base("llama").eval(), text(10, 5)
    sequential, independent = KeyValueStore(base), KeyValueStore(base, "independent")
    file = [text(16, 0)]
    torch.testing.assert_close(
        independent.losses(independent.write(file), asked), sequential.losses(sequential.write(file), asked)
    )


def test_what_cannot_be_done_says_why() -> None:
    store = KeyValueStore(tiny_base("llama").eval())
    state = store.write([text(8, 0)])
    with pytest.raises(DataError, match="only one has"):
        compose(state, KeyValueStore(tiny_base("qwen3_5").eval()).write([text(8, 0)]))
    with pytest.raises(DataError, match="go with encoding 'independent'"):
        KeyValueStore(tiny_base("llama"), "sequential", "parallel")
    with pytest.raises(DataError, match="at least one token"):
        store.losses(state, text(1, 0))
    with pytest.raises(UnsupportedModelError, match="layers of another kind"):
        KeyValueStore(tiny_base("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0))
