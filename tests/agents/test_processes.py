"""The processes of a training: what they gather, sum and agree on, in real gloo processes on the CPU."""

import ast
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import diffusion_gym
import diffusion_gym.agents
import diffusion_gym.wrappers
from diffusion_gym.agents import processes as module
from diffusion_gym.agents.processes import PeerFailed, Processes


@pytest.fixture
def unlaunched(monkeypatch):
    """An environment in which no launcher has been."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "MASTER_", "LOCAL_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_they_know_who_they_are(in_processes):
    def introduce(processes):
        processes.gather_json(None)  # else the first may be gone before the last has found it
        return [processes.index, processes.count, str(processes.device), processes.main, dist.get_backend()]

    found = in_processes(3, introduce)
    assert found == [[index, 3, "cpu", index == 0, "gloo"] for index in range(3)]


# --- tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_gather_joins_in_order(in_processes, dtype):
    whole = (torch.arange(24).view(6, 4) % 3).to(dtype)

    def gather(processes):
        own = whole[2 * processes.index : 2 * processes.index + 2]
        gathered = processes.gather(own.T.contiguous().T)  # columns first in memory
        assert gathered.dtype == dtype
        return gathered.tolist()

    assert in_processes(3, gather) == [whole.tolist()] * 3


@pytest.mark.parametrize("bucket, messages", [(1, 6), (5, 2), (7, 2), (10**6, 1)])
def test_the_sum_does_not_depend_on_how_it_is_cut_into_messages(in_processes, monkeypatch, bucket, messages):
    """Shapes of 1, 3, 7, 2, 2 and 1 numbers: tensors larger than a message, whole messages, and a rest."""
    monkeypatch.setattr(module, "_BUCKET", bucket)
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (7, 1), (2,), (1, 2), (1,)]
    parts = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]

    def add(processes):
        sent, genuine = [], dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(len(tensor)) or genuine(tensor))
        processes.sum_(parts[processes.index])
        return [len(sent), [part.tolist() for part in parts[processes.index]]]

    found = in_processes(3, add)
    for count, sums in found:
        assert count == messages
        for ours, *addends in zip(sums, *parts, strict=True):
            torch.testing.assert_close(torch.tensor(ours), sum(addends))
    assert all(sums == found[0][1] for _, sums in found)  # bit for bit the same everywhere


def test_the_sum_is_taken_in_float32_and_in_place(in_processes):
    def add(processes):
        half = torch.full((2, 3), 1 + processes.index, dtype=torch.bfloat16)
        strided = torch.full((3, 2), 1.0 + processes.index).T
        memory = [half.data_ptr(), strided.data_ptr()]
        processes.sum_([half, strided])
        assert memory == [half.data_ptr(), strided.data_ptr()] and half.dtype == torch.bfloat16
        processes.sum_([])
        return [half.tolist(), strided.tolist()]

    assert in_processes(2, add) == [[[[3.0] * 3] * 2] * 2] * 2


def test_weights_begin_as_the_main_process_has_them(in_processes, monkeypatch):
    monkeypatch.setattr(module, "_BUCKET", 4)

    def copy(processes):
        torch.manual_seed(processes.index)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in [(2, 3), (), (1,)]]
        before = [weight.tolist() for weight in weights]
        processes.copy_main_(weights)
        return [before, [weight.tolist() for weight in weights]]

    found = in_processes(3, copy)
    assert [after for _, after in found] == [found[0][0]] * 3
    assert found[0][0] != found[1][0]


# --- JSON ------------------------------------------------------------------------------------------------------

VALUES = [
    ["", None, []],
    ["ein grüner Kreis 🟢 \udc80", {"a": [1, 2.5, None]}, True],
    ["x" * 100_000, 10**15, ["日本語"]],
]


def test_json_of_any_length_comes_through(in_processes):
    assert in_processes(3, lambda p: p.gather_json(VALUES[p.index])) == [VALUES] * 3


def test_not_a_number_comes_through(in_processes):
    found = in_processes(2, lambda p: repr(p.gather_json([float("nan"), float("inf")])))
    assert found == ["[[nan, inf], [nan, inf]]"] * 2


# --- agreement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failing, expected",
    [
        ([], [None, None, None]),
        ([1], ["PeerFailed: {1}", "ValueError: no 1", "PeerFailed: {1}"]),
        ([0, 2], ["ValueError: no 0", "PeerFailed: {0}", "ValueError: no 2"]),
        ([0, 1, 2], ["ValueError: no 0", "ValueError: no 1", "ValueError: no 2"]),
    ],
)
def test_one_failure_ends_all(in_processes, failing, expected):
    told = {"{1}": "process 1 of 3 failed: ValueError: no 1", "{0}": "process 0 of 3 failed: ValueError: no 0"}

    def agree(processes):
        index = processes.index
        try:
            processes.agree(ValueError(f"no {index}") if index in failing else None)
        except (ValueError, PeerFailed) as error:
            return f"{type(error).__name__}: {error}"
        return None

    for short, text in told.items():
        expected = [line and line.replace(short, text) for line in expected]
    assert in_processes(3, agree) == expected


# --- shares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, total", [(1, 3), (2, 6), (3, 3), (4, 8)])
def test_the_shares_in_order_are_the_whole(count, total):
    shares = [list(Processes(index, count).share(total)) for index in range(count)]
    assert [item for share in shares for item in share] == list(range(total))
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("count, total", [(2, 3), (4, 6), (4, 2)])
def test_an_uneven_share_is_refused(count, total):
    message = f"{total} rollout batches an iteration cannot be shared evenly by {count} processes; make samples_per"
    with pytest.raises(ValueError, match=message):
        Processes(0, count).share(total)


# --- alone -----------------------------------------------------------------------------------------------------


def test_alone_nothing_needs_a_launcher(unlaunched):
    alone, tensor = Processes.launched(), torch.arange(3.0)
    assert alone == Processes() and alone.main and not dist.is_initialized()
    assert alone.gather(tensor) is tensor
    assert alone.gather_json("x") == ["x"]
    alone.sum_([tensor])
    assert tensor.tolist() == [0, 1, 2]
    alone.agree(None)
    with pytest.raises(KeyError, match="gone"):
        alone.agree(KeyError("gone"))
    with alone.leaving():
        pass


@pytest.mark.parametrize(
    "name, option",
    [("FSDP", "--use_fsdp"), ("DEEPSPEED", "--use_deepspeed"), ("MEGATRON_LM", "--use_megatron_lm")],
)
@pytest.mark.parametrize("world", ["1", "2"])
def test_sharded_training_is_refused(unlaunched, name, option, world):
    unlaunched.setenv(f"ACCELERATE_USE_{name}", "true")
    unlaunched.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"{option} is not how this package spreads a network .* sharding='fsdp2'"):
        Processes.launched()


def test_several_processes_without_a_launcher_are_refused(unlaunched):
    unlaunched.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 announces several processes.*start them with accelerate launch"):
        Processes.launched()


def test_a_launcher_that_starts_one_process_instead_of_several_is_reported(unlaunched):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    unlaunched.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Processes.launched()  # --num_processes 1
    unlaunched.setenv("MASTER_PORT", "29500")
    with pytest.warns(UserWarning, match="started one process where several were asked for"):
        assert Processes.launched() == Processes()


@pytest.mark.parametrize("fails", [False, True])
def test_the_group_is_left_in_the_end(in_processes, fails):
    def leave(processes):
        try:
            with processes.leaving():
                assert dist.is_initialized()
                processes.agree(OSError("full") if fails else None)
        except (OSError, PeerFailed):
            assert fails
        return dist.is_initialized()

    assert in_processes(2, leave) == [False, False]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux alone")
def test_no_thread_of_the_group_outlives_it(in_processes, monkeypatch):
    """One that does aborts the interpreter on its way out; a later import must not keep the group alive."""

    def threads():
        return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

    def leave(_):
        before = threads()
        import torch.distributed.nn.functional  # noqa: F401 - as diffusers does

        with Processes.launched().leaving():
            pass
        return [before, threads()]

    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        monkeypatch.delitem(sys.modules, name)
    for before, after in in_processes(2, leave):
        assert any("gloo" in name for name in before)
        assert not any("gloo" in name for name in after)


# --- no pickle -------------------------------------------------------------------------------------------------

PICKLED = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "isend_object", "irecv_object", "pickle", "cloudpickle", "dill"),
}


def names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


def test_nothing_on_the_wire_is_pickled():
    folders = {Path(package.__path__[0]) for package in (diffusion_gym, diffusion_gym.agents, diffusion_gym.wrappers)}
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    assert {"processes.py", "replay.py", "vector.py", "one_step.py"} <= {path.name for path in sources}
    found = {(path.name, name) for path in sources for name in names_in(ast.parse(path.read_text()))}
    assert not {(path, name) for path, name in found if name in PICKLED}
    assert ("processes.py", "all_gather") in found  # the search sees attributes
