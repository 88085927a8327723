#!/usr/bin/env bash
# tensorboard 2.21.0: event files are read in the order of their names, and a name ends in how many writers its process
# had made before, without leading zeros. Of two that one process begins within a second, 10 sorts before 9: the newer
# file is read first, the restart that it tells of finds nothing to hide, and the values that a resumed training took
# back stay in the chart beside its own. As 7 and 8, or a second apart, they do not.
# Seen: as 7 and 8 [(8, 8.0), (16, -16.0)]; as 9 and 10 four values, [(16, -16.0), (8, 8.0), (16, 16.0), (24, 24.0)]
# Here: a resumed run is a process of its own that begins seconds later; the test of it waits for the next second.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tensorboard==2.21.0 protobuf==7.36.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def write(folder, values=(), restart=None):
    writer = EventFileWriter(folder)
    if restart is not None:
        writer.add_event(Event(step=restart, session_log=SessionLog(status=SessionLog.START)))
    for step, value in values:
        summary = Summary(value=[Summary.Value(tag="loss", simple_value=value)])
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.close()


def resumed(folder):
    while time.time() % 1 > 0.1:  # both within a second
        time.sleep(0.01)
    write(folder, [(8, 8.0), (16, 16.0), (24, 24.0)])
    write(folder, [(16, -16.0)], restart=9)
    counts = sorted(int(path.name.rpartition(".")[2]) for path in Path(folder).iterdir())
    events = EventAccumulator(folder).Reload().Scalars("loss")
    return counts, [(event.step, event.value) for event in events]


while True:
    write("others")
    last = max(int(path.name.rpartition(".")[2]) for path in Path("others").iterdir())
    if last == 6:
        break
(one, hidden), (two, shown) = resumed("one"), resumed("two")
print(one, hidden)
print(two, shown)
expected = one == [7, 8] and hidden == [(8, 8.0), (16, -16.0)]
sys.exit(not (expected and two == [9, 10] and sorted(shown) == [(8, 8.0), (16, -16.0), (16, 16.0), (24, 24.0)]))
PYTHON
