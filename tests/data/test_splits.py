import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_batchcam.data.splits import balanced_selection, random_selection, stratified_split
from distributed_batchcam.errors import InputError


def split(targets, size, num_classes):
    return stratified_split(targets, size, tuple(f"c{i}" for i in range(num_classes)), "test", "go without")


@given(st.data(), st.lists(st.integers(2, 30), min_size=1, max_size=6))
def test_split_is_a_stratified_partition(data, counts):
    total, classes = sum(counts), len(counts)
    size = data.draw(st.integers(classes, total - classes))
    order = torch.tensor(data.draw(st.permutations(range(total))))
    targets = torch.arange(classes).repeat_interleave(torch.tensor(counts))[order]
    rest, held_out = split(targets, size, classes)
    assert len(held_out) == size
    assert sorted(torch.cat([rest, held_out]).tolist()) == list(range(total))
    assert rest.tolist() == sorted(rest.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    taken = torch.bincount(targets[held_out], minlength=classes).tolist()
    assert all(1 <= took < count for took, count in zip(taken, counts, strict=True))
    exact = [size * count / total for count in counts]
    if all(1 <= share <= count - 1 for share, count in zip(exact, counts, strict=True)):
        assert all(abs(took - share) < 1 for took, share in zip(taken, exact, strict=True))


def test_split_is_in_proportion():
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    assert torch.bincount(targets[split(targets, 20, 3)[1]]).tolist() == [12, 6, 2]


def test_rare_class_is_held_out_all_the_same():
    targets = torch.tensor([0] * 998 + [1] * 2)
    assert torch.bincount(targets[split(targets, 5, 2)[1]]).tolist() == [4, 1]


def test_split_draws_at_random_but_ever_the_same():
    targets = torch.zeros(1000, dtype=torch.long)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = split(targets, 100, 1)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(split(targets, 100, 1)[1], first)
    assert 400 < first.float().mean() < 600


@pytest.mark.parametrize("size", [1, 9, 0])
def test_impossible_size_is_refused_with_the_possible_ones(size):
    with pytest.raises(InputError, match=rf"^{size} test images .*10 of 2 classes; choose from 2 to 8$"):
        split(torch.arange(10) % 2, size, 2)


def test_class_of_one_image_is_named():
    with pytest.raises(InputError, match=r"'c1' has 1 image.*test.*go without"):
        split(torch.tensor([0, 0, 0, 1]), 2, 2)
    with pytest.raises(InputError, match="'c2' has 0 image"):
        split(torch.tensor([0, 0, 0, 1, 1]), 3, 3)


def test_selection_takes_the_first_of_every_class_then_the_second():
    targets = torch.tensor([2, 0, 0, 0, 1, 2, 0, 1])
    assert balanced_selection(targets, 3).tolist() == [0, 1, 4]
    assert balanced_selection(targets, 4).tolist() == [0, 1, 2, 4]
    assert balanced_selection(targets, 6).tolist() == [0, 1, 2, 4, 5, 7]
    assert balanced_selection(targets, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert balanced_selection(targets, 100).tolist() == list(range(8))


@given(st.data(), st.lists(st.integers(3, 30), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 5))
def test_random_selection_takes_as_many_of_every_class(data, counts, per_class, seed):
    order = torch.tensor(data.draw(st.permutations(range(sum(counts)))))
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    chosen = random_selection(targets, per_class, tuple(map(str, range(len(counts)))), seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.bincount(targets[chosen], minlength=len(counts)).tolist() == [per_class] * len(counts)


def test_random_selection_is_drawn_by_its_seed_alone():
    targets = torch.arange(1000) % 2
    draws = [random_selection(targets, 50, ("a", "b"), seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert 400 < torch.tensor(draws[0]).float().mean() < 600
    assert random_selection(targets, 500, ("a", "b")).tolist() == list(range(1000))


def test_random_selection_names_a_class_that_is_too_small():
    with pytest.raises(InputError, match=r"class 'owl' has 1 image\(s\), not 2; choose fewer"):
        random_selection(torch.tensor([0, 0, 1]), 2, ("cat", "owl"))
    with pytest.raises(InputError, match=r"class 'owl' has 0 image\(s\), not 1"):
        random_selection(torch.tensor([0, 0]), 1, ("cat", "owl"))
