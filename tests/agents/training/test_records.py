"""Lines of records: a bad one among them is named, and the others are read and stay."""

import pytest

from diffusion_gym.agents.training.records import append_record, drop_records_after, read_metrics


def line(iteration):
    return {"iteration": iteration, "reward_queries": 8 * iteration, "reward_mean": 0.5, "seconds": 1.0, "own": [1]}


NO_RECORDS = [b"{oops", b"[]", b"3", b"{}", b'{"iteration": "2"}', b'{"iteration": true}', b"", b"\x80\xff"]


@pytest.mark.parametrize("bad", NO_RECORDS)
def test_one_bad_line_is_named_and_those_before_and_after_it_are_kept(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 3, 4):
        append_record(path, line(iteration))
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + b"\n" + b"".join(others))
    words = r"metrics\.jsonl: all but line 2 is read .*line 2, is no record of an iteration"
    with pytest.warns(UserWarning, match=words) as told:
        assert read_metrics(path) == [line(1), line(3), line(4)]
    assert len(told) == 1
    with pytest.warns(UserWarning):
        drop_records_after(path, 3)
    assert path.read_bytes() == first + bad + b"\n" + others[0]
    with pytest.warns(UserWarning):
        drop_records_after(path, 1)  # what came after the last record that is kept is done again
    assert path.read_bytes() == first


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    append_record(path, line(1))
    path.write_bytes(path.read_bytes() + b'{"iterat')
    assert read_metrics(path) == [line(1)]
    drop_records_after(path, 1)
    append_record(path, line(2))
    assert read_metrics(path) == [line(1), line(2)]
