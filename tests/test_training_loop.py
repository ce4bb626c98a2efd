"""What all trainers share: the schedule, stopping early, and a run's folder."""

import itertools
import os
import signal
import threading
from pathlib import Path

import programs
import pytest
import torch

from t2l.errors import OutputError, TrainingError
from t2l.train.loop import StopRequest, schedule
from t2l.train.metrics import MetricLogger
from t2l.train.resume import begin_run, check_run, write_state


def test_the_schedule_rises_and_falls_linearly() -> None:
    shares = [schedule(step, 100, 0.2) for step in range(101)]
    assert shares[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert shares[20] == 1.0 and shares[100] == 0.0
    falls = [a - b for a, b in itertools.pairwise(shares[20:])]
    assert max(falls) - min(falls) < 1e-12
    assert schedule(0, 10, 0.0) == 1.0


def test_time_up_is_a_reason_to_stop() -> None:
    assert StopRequest(0.0, started=0.0)
    assert not StopRequest(None) and not StopRequest(60.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_asks_and_the_second_one_insists(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop and stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    with pytest.raises(KeyboardInterrupt):
        stop.raise_if_interrupted(print, "is saved")


def test_a_thread_without_signals_can_train_too() -> None:
    found: list[bool] = []

    def work() -> None:
        with StopRequest(0.0, started=0.0) as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


def test_one_of_two_runs_gets_a_new_folder(tmp_path: Path) -> None:
    """Both may pass `check_run` before either begins; the claim itself lets one of them in."""
    run = tmp_path / "run"
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def start(number: int) -> None:
        assert check_run(run, {}, resume=False) is False
        barrier.wait()
        try:
            begin_run(run, {"number": number})
            outcomes.append("won")
        except TrainingError as error:
            assert "is not empty" in str(error)
            outcomes.append("refused")

    threads = [threading.Thread(target=start, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]


def test_what_a_killed_process_left_is_swept_when_the_run_goes_on(tmp_path: Path) -> None:
    begin_run(tmp_path, {"a": 1})
    write_state(tmp_path, {"x": torch.zeros(1)}, {"step": 1})
    (tmp_path / ".state.safetensors.4711").write_bytes(b"half")
    (tmp_path / ".tmpXYZ").write_bytes(b"half")  # safetensors' own
    assert check_run(tmp_path, {"a": 1}, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "state.safetensors"]


def test_a_run_may_go_on_in_another_number_of_parts(tmp_path: Path) -> None:
    """What says how a batch is computed, and by whom, may change; it was not even there in older versions."""
    begin_run(tmp_path, {"train": {"max_steps": 3}})
    parts = {"gradient_accumulation_steps": 4, "fsdp": "full_shard", "ddp_timeout": 60}
    assert not check_run(tmp_path, {"train": {"max_steps": 3, **parts}}, resume=True)
    with pytest.raises(TrainingError, match=r"train\.max_steps was 3, is 4\."):
        check_run(tmp_path, {"train": {"max_steps": 4, **parts}}, resume=True)


def test_processes_stop_after_the_step_at_which_they_agreed() -> None:
    others = [False]
    with StopRequest(agree=lambda *flags: (flags[0] or others[0], flags[1])) as stop:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "who waits for a dead partner ends when told to"
        stop.settle()
        assert not stop
        others[0] = True
        assert not stop and not stop.interrupted
        stop.settle()
        assert stop and stop.interrupted


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from t2l.errors import OutputError
from t2l.train.resume import begin_run, read_facts, write_state
run = Path(sys.argv[1])
begin_run(run, {})
write_state(run, {"x": torch.zeros(4)}, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_state(run, {"x": torch.zeros(100_000)}, {"step": 2})
except OutputError as error:
    print(error)
print(read_facts(run)["step"], sorted(path.name for path in run.iterdir()))
"""


def test_a_full_disk_is_named_and_the_state_before_stays(tmp_path: Path) -> None:
    done = programs.run(["-c", FULL_DISK, str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    message, state = done.stdout.splitlines()
    assert message.startswith("Cannot write") and "state.safetensors" in message
    assert state == "1 ['config.json', 'state.safetensors']"


def test_numbers_that_cannot_be_written_are_an_error_of_ours(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, {}, steps=1, first_step=0, report_to="none", bar=False, log=lambda line: None)
    logger.path = Path("/dev/full")
    with pytest.raises(OutputError, match="Cannot write /dev/full: No space left"):
        logger.record({"step": 1})
