"""The rows that a pass keeps: which ones, how many are in memory, and what a merge makes of two samples."""

import pytest
import torch

from linpass.singlepass.row_store import PLACES, RowStore, fold_of, hashed
from linpass.singlepass.tasks import Rows

WIDTH = 3


def rows_of(numbers_N):
    """Rows whose first feature and weight say which they are."""
    features_ND = numbers_N[:, None].float() * torch.tensor([1.0, -2.0, 0.5])
    return Rows(features_ND, numbers_N % 5, numbers_N.double() + 1, numbers_N)


def filled(numbers_N, limit, seed=3, batch=40):
    store = RowStore(limit, seed)
    for part in numbers_N.split(batch):
        store.add(rows_of(part))
    return store


def brute_force(numbers, limit, seed=3):
    """Numbers of the rows of a sample, from all of them at once."""
    hash_of = {number: int(hashed(torch.tensor([number * PLACES]), seed)) for number in numbers}
    return sorted(sorted(numbers, key=lambda number: (hash_of[number], number))[:limit])


def assert_holds(store, numbers):
    """The sample is these rows, each with all that is its own."""
    rows, numbers_N = store.all(), torch.tensor(numbers, dtype=torch.int64)
    assert rows["keys"].tolist() == [number * PLACES for number in numbers]
    expected = rows_of(numbers_N)
    for name in ("features_ND", "targets", "weights_N"):
        torch.testing.assert_close(rows[name], getattr(expected, name), rtol=0, atol=0)
    assert rows["hashes"].dtype == torch.int64
    assert torch.equal(rows["hashes"], hashed(rows["keys"], store.seed))


def test_the_sample_does_not_depend_on_the_order():
    stores = [filled(order, 20).all() for order in (torch.arange(300), torch.arange(300).flip(0))]
    assert len(stores[0]["keys"]) == 20
    assert stores[0].keys() == stores[1].keys()
    for name, tensor in stores[0].items():
        torch.testing.assert_close(tensor, stores[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 7, 40, 600])
@pytest.mark.parametrize("limit", [0, 1, 4, 50, 599, 600, 700])
def test_the_sample_is_that_of_all_rows_at_once_and_no_more_is_held(limit, batch, monkeypatch):
    monkeypatch.setattr("linpass.singlepass.row_store.CHUNK", 16)  # several parts are left of 50 rows
    store, order = RowStore(limit, 3), torch.randperm(600, generator=torch.Generator().manual_seed(limit * batch))
    for seen, part in enumerate(order.split(batch), 1):
        store.add(rows_of(part))
        assert store.rows_held <= 1.25 * limit
        assert len(store) == min(seen * batch, 600, limit)
        if seen == 5:  # asking in the middle changes nothing later
            assert_holds(store, brute_force(order[: seen * batch].tolist(), limit))
    assert_holds(store, brute_force(range(600), limit))
    assert store.rows_held == min(limit, 600)


def test_few_rows_come_in_once_the_sample_is_full(monkeypatch):
    store = filled(torch.arange(1000), 50)
    highest = int(store.all()["hashes"].max())
    later = torch.arange(1000, 3000)
    lower = int((hashed(later * PLACES, 3) <= highest).sum())
    kept = []
    monkeypatch.setattr(store, "_drop_if_full", lambda: kept.append(store.rows_held))
    for part in later.split(40):
        store.add(rows_of(part))
    assert kept[-1] - 50 == lower > 0


def test_small_parts_are_joined():
    store = filled(torch.arange(900), 200, batch=1)
    assert store.rows_held >= 200
    assert len(store._parts) <= 51  # one, and a quarter of the limit that has come since


def test_equal_hashes_are_kept_by_key(monkeypatch):
    monkeypatch.setattr("linpass.singlepass.row_store.hashed", lambda numbers_N, seed: numbers_N // PLACES % 3)
    for order in (torch.arange(90), torch.arange(90).flip(0), torch.arange(90).roll(41)):
        rows = filled(order, 40, batch=7).all()
        assert (rows["keys"] // PLACES).tolist() == sorted([*range(0, 90, 3), *range(1, 31, 3)])


@pytest.mark.parametrize("first", [0, 4000])
def test_two_halves_of_a_merged_sample_have_half_each(first):
    rows, limit = 4000, 600
    mine, loaded = filled(torch.arange(rows), limit), RowStore(limit, 3)
    loaded.load_state_dict(filled(torch.arange(first, first + rows), limit).state_dict())
    loaded.renumber(rows)
    mine.add(loaded.all())
    mine.add(rows_of(torch.arange(0)))  # nothing
    sample = mine.all()
    assert len(sample["keys"]) == limit == mine.rows_held
    from_loaded = int((sample["keys"] >= rows * PLACES).sum())
    # binomial of 600 halves: a standard deviation of 12.2, five of them; equal numbers of both halves are equal hashes
    assert abs(from_loaded - limit / 2) <= (61 if first else 1)
    others = RowStore(limit, 3)
    others.add(loaded.all())
    others.add(filled(torch.arange(rows), limit).all())
    assert torch.equal(others.all()["keys"], sample["keys"])


def test_rows_of_a_later_pass_have_their_share_after_some_were_removed():
    store = filled(torch.arange(4000), 400)
    gone = filled(torch.arange(2000), None)
    assert store.remove(gone.all(), by_key=True) == 400 - len(store) > 0
    for part in torch.arange(4000, 6000).split(40):
        store.add(rows_of(part))
    highest = int(filled(torch.arange(4000), 400).all()["hashes"].max())
    left = torch.arange(2000, 6000)
    assert_holds(store, brute_force(left[hashed(left * PLACES, 3) <= highest].tolist(), 400))


def test_an_unlimited_store_keeps_all_rows_in_the_order_of_their_keys():
    store = filled(torch.randperm(300, generator=torch.Generator().manual_seed(0)), None)
    assert len(store) == store.rows_held == 300
    assert_holds(store, list(range(300)))
    other = store.copy()
    other.renumber(300)
    store.add(rows_of(torch.arange(300, 310)))
    assert_holds(store, list(range(310)))
    assert other.all()["keys"].tolist() == [number * PLACES for number in range(300, 600)]
    assert torch.equal(other.all()["hashes"], hashed(torch.arange(300) * PLACES, 3))


def test_hashes_spread_evenly():
    numbers = hashed(torch.arange(100_000), seed=1)
    assert (numbers >= 0).all()
    counts = torch.bincount(numbers % 10, minlength=10)
    # ten bins of 10,000 +- 95 each: five standard deviations
    assert (counts - 10_000).abs().max() < 500
    assert len(numbers.unique()) > 99_000
    assert torch.equal(fold_of(torch.arange(100_000), 1, 10), numbers % 10)
