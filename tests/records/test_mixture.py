import collections
import re

import numpy as np
import pytest
from absl import flags

from vcm_jax.records import mixture
from vcm_jax.records.schema import RecordError

SHAPES = mixture.Shapes(clip=(2, 3), sync=(8, 3))


class Source(list):
    """Records in memory, numbered; those of a text-audio source lack clip and sync."""

    def __init__(self, first, size, video=True):
        super().__init__(self.record(i, video) for i in range(first, first + size))

    @staticmethod
    def record(number, video):
        record = {
            "id": str(number),
            "caption": "" if number == 1 else "a sound",
            "latent_mean": np.full((4, 2), number, np.float32),
            "latent_std": np.zeros((4, 2), np.float32),
            "text": np.ones((5, 3), np.float16),
        }
        if video:
            record |= {"clip": np.ones((2, 3), np.float16), "sync": np.ones((8, 3), np.float16)}
        return record


def sources():
    return [Source(0, 7), Source(100, 3, video=False)]


def numbers(batches):
    return [batch["latent_mean"][:, 0, 0].astype(int).tolist() for batch in batches]


def read(first_step=0, last_step=10, seed=0, **kwargs):
    mixed = mixture.mix(sources(), [1, 1], seed)
    return list(
        mixture.batches(
            mixed, SHAPES, batch_size=6, first_step=first_step, last_step=last_step, **kwargs
        )
    )


def test_sources_take_turns_by_weight_whatever_their_size():
    seen = np.ravel(numbers(read(last_step=40)))
    assert abs((seen >= 100).mean() - 0.5) < 0.02
    counts = collections.Counter(seen[seen < 100].tolist())
    assert max(counts.values()) - min(counts.values()) <= 1, "an epoch shows every record once"
    mixed = mixture.mix(sources(), [3, 1], 0)
    share = np.mean([int(mixed[i]["id"]) >= 100 for i in range(400)])
    assert abs(share - 0.25) < 0.02


def test_the_order_depends_on_seed_and_index_alone():
    assert numbers(read()) == numbers(read())
    assert numbers(read()) != numbers(read(seed=1))
    assert numbers(read(first_step=4)) == numbers(read())[4:]
    shares = [numbers(read(process=i, processes=3)) for i in range(3)]
    assert [a + b + c for a, b, c in zip(*shares)] == numbers(read())


def test_epochs_are_shuffled_anew():
    mixed = mixture.mix([Source(0, 50)], [1.0], 0)
    first, second = ([mixed[i]["id"] for i in range(k, k + 50)] for k in (0, 50))
    assert sorted(first) == sorted(second) and first != second


def test_missing_modalities_become_flags():
    batch = read(last_step=1)[0]
    sound_only = batch["latent_mean"][:, 0, 0] >= 100
    np.testing.assert_array_equal(batch["has_video"], ~sound_only)
    assert batch["clip"].dtype == np.float16 and batch["sync"].shape == (6, 8, 3)
    assert not batch["clip"][sound_only].any() and batch["clip"][~sound_only].all()
    batches = read(last_step=20)
    flags = np.concatenate([b["has_text"] for b in batches])
    empty = np.concatenate([b["latent_mean"][:, 0, 0] for b in batches]) == 1
    np.testing.assert_array_equal(flags, ~empty)


def test_parsing_of_sources():
    assert mixture.parse_source("a/b=2") == ("a/b", 2.0)
    assert mixture.parse_source("a=b/c=0.5") == ("a=b/c", 0.5)
    assert mixture.parse_source("a/b") == ("a/b", 1.0)
    for text in ("a=0", "a=-1", "a=x", "=1", "a=inf", "a=nan"):
        with pytest.raises(ValueError, match="must be 'PATH=WEIGHT'"):
            mixture.parse_source(text)


def test_a_batch_that_the_processes_do_not_divide():
    with pytest.raises(ValueError, match="batch_size 6 .* 4 processes"):
        read(processes=4)


class Damaged(Source):
    """A source some of whose records cannot be read."""

    def __init__(self, first, size, damaged):
        super().__init__(first, size)
        self.damaged = damaged

    def __getitem__(self, index):
        if index in self.damaged:
            raise RecordError(f"record {index}: damaged")
        return super().__getitem__(index)


def test_a_damaged_record_is_passed_over_and_reported(caplog):
    caplog.set_level("WARNING")
    mixed = mixture.mix([Damaged(0, 7, {2, 3})], [1], 0)
    kwargs = dict(batch_size=7, first_step=0, last_step=1)
    (batch,) = mixture.batches(mixed, SHAPES, **kwargs)
    seen = batch["latent_mean"][:, 0, 0].astype(int).tolist()
    assert sorted(seen) == [0, 1, 4, 4, 4, 5, 6]
    assert [i if i not in (2, 3) else 4 for i in (mixed.locate(k)[1] for k in range(7))] == seen
    for count, record in ((1, "[23]"), (2, "[23]")):
        assert re.search(
            f"damaged record {count} passed over: record {record}: damaged", caplog.text
        )
    with pytest.raises(RecordError, match="2 damaged records, the last: record [23]: damaged"):
        list(mixture.batches(mixed, SHAPES, max_damaged=1, **kwargs))
    with pytest.raises(RecordError, match="2 records in a row are damaged"):
        list(mixture.batches(mixture.mix([Damaged(0, 2, {0, 1})], [1], 0), SHAPES, **kwargs))


def test_a_damaged_record_counts_once_in_any_number_of_epochs(caplog):
    caplog.set_level("WARNING")
    sources = [Damaged(0, 7, {2, 3}), Damaged(7, 7, {2})]
    mixed = mixture.mix(sources, [1, 1], 0)
    kwargs = dict(batch_size=7, first_step=0, last_step=40)
    assert len(list(mixture.batches(mixed, SHAPES, max_damaged=3, **kwargs))) == 40
    assert caplog.text.count("passed over") == 3
    with pytest.raises(RecordError, match="3 damaged records"):
        list(mixture.batches(mixed, SHAPES, max_damaged=2, **kwargs))


def test_the_stream_resumes_exactly_with_other_processes_and_workers():
    """From step 1,000 on it equals the stream of one process that never stopped."""
    flags.FLAGS.mark_as_parsed()  # worker processes want it
    mixed = mixture.mix(sources(), [1, 1], 0)
    sample = lambda i: mixed[i]["latent_mean"][0, 0]
    expected = [[sample(6 * step + row) for row in range(6)] for step in range(1000, 1004)]
    for processes, workers in ((1, 0), (3, 0), (1, 2)):
        found = [
            numbers(read(1000, 1004, process=i, processes=processes, num_workers=workers))
            for i in range(processes)
        ]
        assert [sum(rows, []) for rows in zip(*found)] == expected, (processes, workers)


def test_sources_and_weights_that_do_not_fit():
    one = Source(0, 3)
    one.path = "records/a"
    for reason, given, weights in (
        ("records/a: weight -1", [one], [-1]),
        ("records/a: weight 0", [one], [0]),
        ("records/a: weight 1e.308 must lie between 1e-06 and 1e.06", [one], [1e308]),
        ("0 data sources", [], []),
        ("1 data sources and 2 weights", [one], [1, 1]),
        ("records/a is listed twice", [one, one], [1, 1]),
        ("0: no records", [Source(0, 0)], [1]),
    ):
        with pytest.raises(ValueError, match=reason):
            mixture.mix(given, weights, 0)
