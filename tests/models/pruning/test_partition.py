"""Sizes, scores and regions against the method's formulas, written out naively."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_pop import slow_order, slow_scores, slow_sizes
from tolerance import assert_same

from models.pruning.evidence import Evidence, channel_scores, head_scores
from models.pruning.partition import keep_best, partition_channels, partition_sizes, undecided
from popengine.studies.rules import retained_sizes

pytestmark = pytest.mark.numeric


@given(st.integers(1, 5000), st.floats(0, 0.999), st.floats(0, 2))
def test_sizes_follow_the_formulas(channels: int, ratio: float, width: float) -> None:
    sizes = partition_sizes(channels, ratio, width)
    active, pick, retained = slow_sizes(channels, ratio, width)
    assert (sizes.computed, sizes.pick, sizes.retained, sizes.candidate) == (active, pick, retained, 2 * pick)
    assert sizes.channels == channels
    assert min(sizes.retained, sizes.candidate, sizes.pruned, sizes.pick) >= 0


def test_width_zero_freezes_and_ratio_zero_keeps_everything() -> None:
    assert partition_sizes(1000, 0.3, 0.0).candidate == 0
    assert partition_sizes(1000, 0.0, 0.1).retained == 1000


@given(channels=st.integers(1, 300), ratio=st.floats(0, 0.99), share=st.floats(0, 0.99), width=st.floats(0, 2))
def test_a_retained_share_is_what_it_says_and_never_costs_a_channel_that_finishes(
    channels: int, ratio: float, share: float, width: float
) -> None:
    sizes, (active, *_) = retained_sizes(channels, ratio, share, width), slow_sizes(channels, ratio, 0)
    assert sizes.computed == active
    assert sizes.retained == min(round(share * channels), active)
    assert sizes.channels == channels
    assert min(sizes.candidate - sizes.pick, sizes.pruned, sizes.pick) >= 0
    if sizes.pick and width >= 1:
        assert sizes.pruned == 0


def test_widest_width_takes_as_many_candidates_as_the_sizes_allow() -> None:
    sizes = partition_sizes(1000, 0.3, 2.0)
    assert (sizes.retained, sizes.candidate, sizes.pruned, sizes.pick) == (400, 600, 0, 300)


@given(
    channels=st.integers(1, 40), ratio=st.floats(0, 0.9), width=st.floats(0, 1), groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_channels_that_stay_in_their_region_keep_their_places(
    channels: int, ratio: float, width: float, groups: int, seed: int
) -> None:
    sizes = partition_sizes(channels, ratio, width).times(groups)
    drawn = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, sizes.channels, generator=drawn)
    found = partition_channels(scores[0], sizes)
    for next_scores in scores[1:]:
        before, wanted = found, partition_channels(next_scores, sizes)
        found = wanted.in_places_of(before)
        for name in ("retained", "candidate", "pruned"):
            new, old, other = (getattr(one, name) for one in (found, before, wanted))
            assert torch.equal(new.sort().values, other)        # ascending, as a new partition has them
            both = torch.isin(old, new)
            assert torch.equal(new[both], old[both]), "a channel that stays has moved"
            of_group = new.unflatten(0, (groups, -1)) // channels if len(new) else new.view(1, 0)
            assert bool((of_group == torch.arange(len(of_group))[:, None]).all()), "a group has another's channel"


def test_scores_equal_a_naive_double_loop() -> None:
    torch.manual_seed(0)
    h, down = torch.randn(2, 5, 12), torch.randn(7, 12)
    fast = channel_scores(h, torch.linalg.vector_norm(down, dim=0))
    assert_same(fast, torch.tensor(slow_scores(h, down)))


def test_tokens_that_are_not_real_do_not_count() -> None:
    torch.manual_seed(0)
    h, norms = torch.randn(2, 5, 12), torch.rand(12)
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    polluted = h.masked_fill(~real.unsqueeze(-1), float("nan"))
    wanted = (h[0, 2:].square().sum(0) + h[1].square().sum(0)).sqrt() * norms
    assert_same(channel_scores(polluted, norms, real), wanted)


def test_evidence_of_a_prompt_in_pieces_is_that_of_the_prompt() -> None:
    torch.manual_seed(0)
    h, norms = torch.randn(2, 9, 12), torch.rand(12)
    whole, pieces = (Evidence(12, h.device) for _ in range(2))
    whole.add(h, None, 18)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        pieces.add(h[:, start:end], None, 2 * (end - start))
    assert_same(pieces.scores(norms), whole.scores(norms))
    assert_same(whole.scores(norms), channel_scores(h, norms))
    assert pieces.tokens == whole.tokens == 18
    pieces.restart()                                            # another prompt owes nothing to this one
    pieces.add(h[:1], None, 9)
    assert_same(pieces.scores(norms), channel_scores(h[:1], norms))
    assert pieces.tokens == 9


def test_padding_is_no_evidence() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 5, 12)
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    padded, bare = (Evidence(12, h.device) for _ in range(2))
    padded.add(h.masked_fill(~real.unsqueeze(-1), float("nan")), real, 8)
    bare.add(torch.cat([h[0, 2:], h[1]])[None], None, 8)
    assert_same(padded.squares, bare.squares)
    padded.add(torch.full((2, 1, 12), float("nan")), torch.tensor([[False], [False]]), 0)      # ended sequences alike
    assert_same(padded.squares, bare.squares)
    assert padded.tokens == bare.tokens == 8


def test_head_scores_equal_a_naive_double_loop() -> None:
    torch.manual_seed(0)
    a, output = torch.randn(2, 5, 3, 4), torch.randn(6, 12)
    coordinates = torch.tensor(slow_scores(a.flatten(2), output)).view(3, 4)
    wanted = torch.tensor([sum(c * c for c in head) ** 0.5 for head in coordinates.tolist()])
    fast = head_scores(channel_scores(a.flatten(2), torch.linalg.vector_norm(output, dim=0)), 4)
    assert_same(fast, wanted)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=40), st.floats(0, 0.9), st.floats(0, 1))
def test_regions_are_the_best_then_the_middle_then_the_rest(values: list[int], ratio: float, width: float) -> None:
    # Few distinct values: most scores tie, and the lower channel must win.
    scores = torch.tensor(values, dtype=torch.float32)
    partition = partition_channels(scores, partition_sizes(len(values), ratio, width))
    order, sizes = slow_order(scores.tolist()), partition.sizes
    assert partition.retained.tolist() == sorted(order[: sizes.retained])
    assert partition.candidate.tolist() == sorted(order[sizes.retained : sizes.active])
    assert partition.pruned.tolist() == sorted(order[sizes.active :])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_the_pick_is_the_best_and_ties_go_to_the_earlier(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    kept = keep_best(torch.tensor(values, dtype=torch.float32), count)
    assert kept.nonzero().flatten().tolist() == sorted(slow_order([float(v) for v in values])[:count])


def test_groups_are_cut_independently() -> None:
    torch.manual_seed(0)
    scores, sizes = torch.rand(3, 8), partition_sizes(8, 0.5, 0.5)
    together = partition_channels(scores, sizes)
    for row in range(3):
        assert torch.equal(together.order[row], partition_channels(scores[row], sizes).order)


@pytest.mark.parametrize("groups", [2, 3])
def test_stretches_of_channels_are_each_cut_and_picked_from_alone(groups: int) -> None:
    scores, looks = torch.rand(2, 24 * groups, generator=torch.Generator().manual_seed(0))
    one = partition_sizes(24, 0.4, 0.3)
    whole = partition_channels(scores, one.times(groups))
    assert whole.sizes.channels == 24 * groups
    picked = whole.candidate[whole.pick(looks[whole.candidate])].tolist()
    wanted: dict[str, list[int]] = {"retained": [], "candidate": [], "pruned": [], "picked": []}
    for first in range(0, 24 * groups, 24):
        alone = partition_channels(scores[first : first + 24], one)
        for region in ("retained", "candidate", "pruned"):
            wanted[region] += (getattr(alone, region) + first).tolist()
        keep = alone.pick(looks[first : first + 24][alone.candidate])
        wanted["picked"] += (alone.candidate[keep] + first).tolist()
    for region in ("retained", "candidate", "pruned"):
        assert getattr(whole, region).tolist() == wanted[region]
    assert picked == wanted["picked"]


def test_a_partition_prints_itself_readably() -> None:
    partition = partition_channels(torch.rand(10), partition_sizes(10, 0.4, 0.4))
    assert repr(partition) == "ChannelPartition(10 channels: 4 retained, 4 candidate (pick 2), 2 pruned)"


def test_scores_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="7 channels"):
        partition_channels(torch.rand(7), partition_sizes(8, 0.5, 0.5))


def test_keeping_everything_is_the_dense_network() -> None:
    partition = undecided(partition_sizes(6, 0.0, 0.1), (2,), torch.device("cpu"))
    assert partition.retained.shape == (2, 6)
    assert partition.candidate.shape == (2, 0)
